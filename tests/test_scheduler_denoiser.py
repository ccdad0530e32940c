"""SchedulerDenoiser against the scheduler's own algebra, and against the closed form of a Gaussian."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn

from mlflow_icr import ICRMonitor, Protocol, SchedulerDenoiser
from mlflow_icr.cli import main
from mlflow_icr.extraction.pipelines import load_denoiser

TYPES = ("epsilon", "sample", "v_prediction")


class Told(nn.Module):
    """A network that gives what it was told to, and remembers what it was given."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.x, self.t = x, t
        return self.answer


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_network_that_knows_the_answer_gives_the_clean_image_back(kind: str, schedule: str) -> None:
    """x_t by the scheduler's add_noise, targets by its get_velocity: the scheduler's words, not ours."""
    scheduler: Any = DDPMScheduler(beta_schedule=schedule, prediction_type=kind)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1, torch.randn(4, 1, 8, 8, generator=generator)
    t = torch.tensor([3, 200, 500, 900])
    target = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, t)}[kind]
    alpha = scheduler.alphas_cumprod[t]
    sigma = ((1 - alpha) / alpha).sqrt()
    denoiser = SchedulerDenoiser(Told(target), scheduler)
    found = denoiser(clean + sigma.view(-1, 1, 1, 1) * noise, sigma)
    # float32 noise of standard deviation sigma is taken off again
    assert (found - clean).abs().amax((1, 2, 3)).le(1e-5 * (1 + sigma)).all()
    network = denoiser.network
    assert isinstance(network, Told)
    torch.testing.assert_close(network.x, scheduler.add_noise(clean, noise, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.t, t.float(), rtol=0, atol=2e-2)
    assert torch.equal(SchedulerDenoiser(network, scheduler, nearest=True).timestep(sigma), t)


@pytest.mark.parametrize("kind", TYPES)
def test_the_best_denoiser_of_a_gaussian_is_its_closed_form(kind: str) -> None:
    """For clean images of variance c^2 each best prediction is linear in x_t, and D(x, sigma) = c^2 / (c^2 + sigma^2) x."""
    c = 0.5
    scheduler = DDPMScheduler(prediction_type=kind)

    class Best(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            # alpha_bar between timesteps from its logarithm: another interpolation than the adapter's
            grid = scheduler.alphas_cumprod.log()
            low = t.floor().long().clamp(max=len(grid) - 2)
            a = (grid[low] + (t - low) * (grid[low + 1] - grid[low])).exp().view(-1, 1, 1, 1)
            seen = c**2 * a + 1 - a  # the variance of x_t
            clean, noise = c**2 * a.sqrt() / seen * x, (1 - a).sqrt() / seen * x
            return {"epsilon": noise, "sample": clean, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean}[kind]

    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.05, 0.29, 1.0, 5.0, 40.0])
    expected = c**2 / (c**2 + sigma**2).view(-1, 1, 1, 1) * x
    # both interpolations agree to a thousandth of a timestep's share; epsilon multiplies that by sigma
    assert ((SchedulerDenoiser(Best(), scheduler)(x, sigma) - expected).abs().amax((1, 2, 3)) < 1e-3 * (1 + sigma)).all()


def test_noise_beyond_the_schedule_has_its_ends_and_pure_noise_has_no_place() -> None:
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert scheduler.alphas_cumprod[-1] < 1e-7
    t = SchedulerDenoiser(nn.Identity(), scheduler).timestep(torch.tensor([1e-6, 1e9]))
    assert t[0] == 0
    assert t.isfinite().all()


def test_a_variance_beside_the_prediction_is_left_aside() -> None:
    x = torch.randn(2, 3, 4, 4)
    found = SchedulerDenoiser(Told(torch.cat([x, x + 9], 1)), DDPMScheduler(prediction_type="sample"))(x, 0.3)
    assert torch.equal(found, x)


def test_a_monitor_reads_a_ddpm_unet(small_unet: nn.Module, digits: Tensor) -> None:
    report = ICRMonitor(SchedulerDenoiser(small_unet, DDPMScheduler()), digits, Protocol(num_views=4)).measure(0)
    assert 0 < report.values["repr/icr"] < 1
    assert "repr/view_error_ratio" in report.values


def test_schedulers_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler, without alphas_cumprod; expected DDPMScheduler"):
        SchedulerDenoiser(nn.Identity(), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="prediction_type is 'flow'; expected one of epsilon, sample, v_prediction"):
        SchedulerDenoiser(nn.Identity(), DDPMScheduler(prediction_type="flow"))


def test_a_network_of_codes_is_not_read_as_one_of_pixels(small_unet: nn.Module, tmp_path: Path) -> None:
    DDPMPipeline(small_unet, DDPMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "vqvae").mkdir()
    with pytest.raises(ValueError, match="checkpoint has a vqvae; expected a network of pixels"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_saved_ddpm_pipeline_is_read_as_it_was_trained(
    small_unet: nn.Module, digits: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    scheduler: Any = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind)
    DDPMPipeline(small_unet, scheduler).save_pretrained(tmp_path / "pipeline")
    before = torch.get_rng_state()
    denoiser, side = load_denoiser(tmp_path / "pipeline")
    assert torch.equal(torch.get_rng_state(), before)
    assert side == 8
    x = digits[:5].float() / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(denoiser(x, 0.3), SchedulerDenoiser(small_unet, scheduler)(x, 0.3))
    for i, image in enumerate(digits[:24]):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(tmp_path / "data" / f"{i:02d}.png")
    command = ["measure", str(tmp_path / "pipeline"), "--data", str(tmp_path / "data"), "--num-views", "4"]
    assert main(command) == 0
    protocol = Protocol(num_images=24, num_views=4)
    expected = ICRMonitor(SchedulerDenoiser(small_unet, scheduler), digits[:24], protocol).measure(0)
    assert json.loads(capsys.readouterr().out)["repr/icr"] == pytest.approx(expected.values["repr/icr"], rel=1e-5)

"""A training that begins with a trained network has that network, and is refused where it would be another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from mlflow_icr import ICRMonitor, Protocol, SchedulerDenoiser
from mlflow_icr.extraction.latents import LatentDenoiser
from mlflow_icr.extraction.pipelines import load_denoiser
from tests.family_runs import SHORT, RecordedRun, configured, finished, started, weights
from tests.tiny_models import dit
from trainers.command_line import train_parser
from trainers.config import config_from, load_config, with_changes
from trainers.console import Console
from trainers.data import DataFacts
from trainers.families import family_of
from trainers.inputs import Inputs, with_measured
from trainers.loop import new_state, train
from trainers.lora import without_lora
from trainers.plan import Device, plan_values
from trainers.run import Run
from trainers.train import configure


def trained(name: str, folder: Path, **changes: Any) -> tuple[nn.Module, Any]:
    """A network with weights of its own, saved as a run's checkpoint."""
    config = configured(name, **changes)
    family = family_of(config, 10)
    network = family.build(1, 8).eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    family.save(folder / "checkpoints" / "000000000064", network)
    return network, family


@pytest.mark.parametrize("name", ["edm-labels", "ddpm-v-labels", "flow-labels", "flow"])
def test_the_network_and_its_noise_are_those_of_the_run(name: str, tmp_path: Path) -> None:
    network, family = trained(name, tmp_path)
    labels = {"labels": True} if "labels" in name else {}
    config = load_config("digits", {**SHORT, **labels, "init_from": str(tmp_path)})
    assert config.network.family == family.config.network.family
    assert config.noise == family.config.noise
    shape = ("block_channels", "attention_resolutions", "hidden_size", "num_layers", "num_heads", "patch_size")
    assert [config.get(key) for key in shape] == [family.config.get(key) for key in shape]
    again = family_of(config, 10)
    found = again.build(1, 8).eval()
    x, sigma = torch.randn(3, 1, 8, 8, generator=torch.manual_seed(0)), torch.tensor([0.1, 0.5, 2.0])
    with torch.no_grad():
        assert torch.equal(again.denoiser(found)(x, sigma), family.denoiser(network)(x, sigma))


@pytest.mark.parametrize("name", ["edm-labels", "flow-labels"])
def test_other_classes_get_a_table_of_their_own_and_none_the_null_class(name: str, tmp_path: Path) -> None:
    network, family = trained(name, tmp_path)
    x, sigma = torch.randn(2, 1, 8, 8, generator=torch.manual_seed(0)), torch.tensor([0.1, 0.5])
    few = family_of(load_config("digits", {**SHORT, "labels": True, "init_from": str(tmp_path)}), 3)
    denoiser = few.denoiser(few.build(1, 8).eval())
    assert few.null_class == 3
    assert torch.isfinite(denoiser(x, sigma, labels=torch.tensor([3, 2]))).all()
    none = family_of(load_config("digits", {**SHORT, "init_from": str(tmp_path)}))
    with torch.no_grad():
        assert torch.equal(none.denoiser(none.build(1, 8).eval())(x, sigma), family.denoiser(network.eval())(x, sigma))
    assert none.null_class == 10


def test_a_lora_alone_is_trained_and_diffusers_loads_it(tmp_path: Path, digits: Tensor) -> None:
    from diffusers import UNet2DModel
    from diffusers.loaders import PeftAdapterMixin

    class Loading(UNet2DModel, PeftAdapterMixin):
        """With the loader that diffusers gives its larger U-Nets."""

    trained("edm-labels", tmp_path, attention_resolutions=(4,))
    config = load_config("digits", {**SHORT, "init_from": str(tmp_path), "lora_rank": 2, "learning_rate": 0.1})
    family, accelerator = family_of(config), Accelerator(cpu=True)
    state = new_state(family.build(1, 8), config, accelerator)
    before = {key: value.clone() for key, value in state.network.state_dict().items()}
    steps = train(state, Inputs(digits[:64]), family, accelerator)
    for _ in range(3):
        next(steps)
    steps.close()
    moved = {key for key, value in state.network.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if "lora" in key}
    family.save(tmp_path / "out", state.network.eval())
    held = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("unet.") for key in held)
    assert sum(value.numel() for value in held.values()) == sum(before[key].numel() for key in moved)
    x, t = torch.randn(2, 1, 8, 8, generator=torch.manual_seed(0)), torch.tensor([0.1, 0.5])
    none = torch.tensor([10, 10])
    with torch.no_grad():
        expected = state.network(x, t, class_labels=none).sample
        merged = UNet2DModel.from_pretrained(tmp_path / "out" / "unet").eval()
        assert torch.allclose(merged(x, t, class_labels=none).sample, expected, atol=1e-5)
        base = Loading.from_pretrained(tmp_path / "checkpoints" / "000000000064" / "unet").eval()
        assert not torch.allclose(base(x, t, class_labels=none).sample, expected, atol=1e-2)
        base.load_lora_adapter(held, prefix="unet")
        assert torch.allclose(base(x, t, class_labels=none).sample, expected, atol=1e-5)
    assert torch.equal(weights(without_lora(without_lora(state.network))), weights(merged))


@pytest.mark.usefixtures("few_errors")
def test_a_lora_is_resumed_where_it_was(tmp_path: Path) -> None:
    trained("edm-labels", tmp_path / "base", attention_resolutions=(4,))
    config = load_config("digits", {**SHORT, "init_from": str(tmp_path / "base"), "lora_rank": 2})
    run = finished(config, tmp_path / "run")
    (tmp_path / "base").rename(tmp_path / "gone")
    again = Run(run.config, tmp_path / "run", resume=True)
    assert again.state.images_seen == 320
    assert torch.equal(weights(again.state.network), weights(run.state.network))
    assert torch.equal(weights(again.state.ema), weights(run.state.ema))
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(run.config.grouped()))
    line = [f"--output-dir={tmp_path / 'run'}", "--preset=digits", f"--init-from={tmp_path / 'base'}", "--resume", "auto"]
    config, *_, resume = configure(train_parser().parse_args(line))
    assert resume
    assert config == run.config


def random_dit(folder: Path, scheduler: Any, channels: int = 1) -> Any:
    """A DiT of diffusers, saved, that learns a variance too and whose blocks have embeddings of their own."""
    torch.manual_seed(3)
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=channels, out_channels=2 * channels, num_layers=3,
        sample_size=8, patch_size=2, num_embeds_ada_norm=5, norm_num_groups=1,
    )  # fmt: skip
    network.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    return network.eval()


@pytest.mark.usefixtures("few_errors")
def test_a_dit_that_was_trained_by_ddpm_goes_on_with_its_prediction(tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    network = random_dit(tmp_path / "dit", scheduler)
    config = load_config("digits", {**SHORT, "init_from": str(tmp_path / "dit"), "lora_rank": 2})
    assert (config.network.family, config.network.kind) == ("ddpm", "transformer")
    run = RecordedRun(config, tmp_path / "run")
    x, sigma = torch.randn(3, 1, 8, 8, generator=torch.manual_seed(0)), torch.tensor([0.1, 0.5, 2.0])
    with torch.no_grad():  # two implementations of the same, the other one with the variance
        expected = SchedulerDenoiser(network, scheduler, null_class=5)(x, sigma)
        assert torch.allclose(run.family.denoiser(run.state.ema)(x, sigma), expected, atol=1e-5)
    assert run.train_to_end(None, Console(run.config, shown=False), lambda: False) == "FINISHED"
    assert {"repr/icr", "loss/heldout", "gen/fd_pixels"} <= set(run.rows[-1])
    saved = tmp_path / "run" / "checkpoints" / "000000000320"
    assert (saved / "pytorch_lora_weights.safetensors").exists()
    denoiser, _ = load_denoiser(saved)
    with torch.no_grad():
        found = denoiser(x, sigma)
        assert torch.allclose(found, run.family.denoiser(run.state.ema.eval())(x, sigma), atol=1e-5)
        assert not torch.allclose(found, expected, atol=1e-3)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(class_labels=[1, 4], num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    again = Run(run.config, tmp_path / "run", resume=True)
    assert torch.equal(weights(again.state.network), weights(run.state.network))


def test_a_pipeline_of_latents_says_what_images_its_transformer_takes(tmp_path: Path) -> None:
    dit(tmp_path).save_pretrained(tmp_path / "dit")
    values = with_changes({"data": "digits", "family": "edm"}, {"init_from": str(tmp_path / "dit"), "family": "ddpm"})
    assert values["resolution"] == 16
    assert values["autoencoder"] == str(tmp_path / "dit" / "vae")
    assert values["transformer"]
    family = family_of(config_from(plan_values(values, DataFacts(100, (16, 16), 3, None), Device("cpu"))))
    network, (before, _) = family.build(4, 8).eval(), load_denoiser(tmp_path / "dit")
    assert isinstance(before, LatentDenoiser)
    x, sigma = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0)), torch.tensor([0.1, 2.0])
    with torch.no_grad():
        assert torch.allclose(family.denoiser(network)(x, sigma), before(x, sigma), atol=1e-5)
    with pytest.raises(ValueError, match="resolution is '16x20'; expected a square for family ddpm"):
        load_config("digits", {"family": "ddpm", "transformer": True, "resolution": "16x20"})


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (diffusers.DDPMScheduler(500, 0.001, 0.012, "scaled_linear", prediction_type="sample"), None),
        (diffusers.DDIMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr True; expected False"),
        (diffusers.ScoreSdeVeScheduler(), "is a ScoreSdeVeScheduler; expected DDPMScheduler or one of its kind"),
        (diffusers.CMStochasticIterativeScheduler(), "is a CMStochasticIterativeScheduler; expected DDPMScheduler"),
        (diffusers.EDMEulerScheduler(prediction_type="v_prediction"), "predicts 'v_prediction'; expected epsilon"),
    ],
)
def test_noise_is_that_of_the_scheduler_or_it_is_refused(scheduler: Any, expected: str | None, tmp_path: Path) -> None:
    trained("ddpm", tmp_path)
    scheduler.save_pretrained(tmp_path / "checkpoints" / "000000000064" / "scheduler")
    if expected is not None:
        with pytest.raises(ValueError, match=expected):
            load_config("digits", {**SHORT, "init_from": str(tmp_path)})
        return
    family = family_of(load_config("digits", {**SHORT, "init_from": str(tmp_path)}))
    assert torch.equal(family.scheduler().alphas_cumprod, scheduler.alphas_cumprod)
    assert family.scheduler().config.prediction_type == scheduler.config.prediction_type
    assert float(family.draw(np.random.default_rng(0), 4000).max()) == 499


def test_dropout_is_the_network_s_own_unless_it_is_given(tmp_path: Path) -> None:
    trained("ddpm", tmp_path, dropout=0.25)
    for changes, expected in (({}, 0.25), ({"dropout": 0.5}, 0.5)):
        config = load_config("digits", {**SHORT, "init_from": str(tmp_path), **changes})
        assert config.network.dropout == expected
        layers = [layer for layer in family_of(config).build(1, 8).modules() if isinstance(layer, nn.Dropout)]
        assert {layer.p for layer in layers if layer.p} == {expected}


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    trained("flow", tmp_path / "flow")
    trained("ddpm", tmp_path / "ddpm")
    for changes, message in (
        (
            {"init_from": "flow", "family": "edm"},
            "family is 'edm'; expected 'flow', which init_from '.*flow' has",
        ),
        ({"init_from": "flow", "num_layers": 2}, "num_layers is 2; expected 3, which init_from '.*flow' has"),
        ({"init_from": "ddpm", "prediction": "v"}, "prediction is 'v'; expected 'epsilon', which init_from '.*ddpm' has"),
        ({"init_from": "ddpm", "block_channels": [8]}, r"block_channels is \(8,\); expected \(16, 32\), which init_from"),
        ({"init_from": "nowhere"}, "init_from is '.*nowhere'; expected a run, a diffusers folder of a UNet2DModel"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config("digits", {**SHORT, **changes, "init_from": str(tmp_path / changes["init_from"])})
    with pytest.raises(ValueError, match="lora_rank is 2; expected 0 without init_from"):
        load_config("digits", {"lora_rank": 2})
    family = family_of(load_config("digits", {**SHORT, "init_from": str(tmp_path / "ddpm")}))
    with pytest.raises(ValueError, match="whose network takes 1 channels; expected 3, as the data has"):
        family.build(3, 8)
    family = family_of(load_config("digits", {**SHORT, "init_from": str(tmp_path / "ddpm"), "lora_rank": 2}))
    with pytest.raises(ValueError, match="lora_rank is 2, but the network of init_from has no attention"):
        family.build(1, 8)
    family = family_of(load_config("digits", {**SHORT, "init_from": str(tmp_path / "flow"), "lora_rank": 999}))
    with pytest.raises(ValueError, match="lora_rank is 999; expected at most 32, the width of its narrowest attention"):
        family.build(1, 8)
    family = family_of(load_config("digits", {**SHORT, "resolution": 16, "init_from": str(tmp_path / "flow")}))
    with pytest.raises(ValueError, match="a transformer for side 8; expected one for 16"):
        family.build(1, 16)


def test_attention_of_a_new_transformer_begins_as_the_fused_layer_does() -> None:
    """SiT makes q, k and v by one layer (Xavier): their deviation is sqrt(2 / (D + 3 D)), .0255 for D = 768."""
    _, state, _ = started(configured("flow", hidden_size=768, num_layers=1, num_heads=12))
    attention: Any = state.network.transformer_blocks[0].attn1
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        assert float(layer.weight.detach().std()) == pytest.approx((2 / (4 * 768)) ** 0.5, rel=0.01)
    assert float(attention.to_out[0].weight.detach().std()) == pytest.approx((2 / (2 * 768)) ** 0.5, rel=0.01)


def test_the_inputs_deviation_is_measured_unless_it_is_given(digits: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config("digits", {"sigma_data": None})
    expected = float((digits[:600].double() / 127.5 - 1).std(unbiased=False))
    measured = with_measured(config, Inputs(digits[:600])).noise.sigma_data
    assert measured == pytest.approx(expected, rel=2e-3)  # three digits
    mean, spread = torch.randn(300, 4, 4, 4), 0.5 * torch.ones(300, 4, 4, 4)
    drawn = Inputs(torch.cat([mean, spread], 1), latent=True).deviation()
    assert drawn == pytest.approx(float((mean.var(unbiased=False) + 0.25).sqrt()), rel=1e-5)
    assert with_measured(load_config("digits", {"sigma_data": 2.0}), Inputs(digits[:600])).noise.sigma_data == 2.0
    assert "sigma_data is 2, but the inputs' standard deviation is 0.7" in caplog.text
    with pytest.raises(ValueError, match="whose images are all of one value"):
        with_measured(config, Inputs(torch.full((8, 1, 8, 8), 255, dtype=torch.uint8)))


def test_growth_of_a_network_that_was_trained_before_is_since_step_0(digits: Tensor, tmp_path: Path) -> None:
    network, family = trained("edm-labels", tmp_path)
    protocol = Protocol(num_views=8, projection=4)
    fresh, before = (
        ICRMonitor(family.denoiser(network), digits, protocol, trained_before=was).measure(0).values for was in (False, True)
    )
    assert "repr/icr_rise" not in fresh
    assert before["repr/icr_rise"] == 0
    assert before["repr/fisher_residual_growth"] == pytest.approx(1)

"""Adapters against the pipelines' own sampling, and what holds for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mlflow_icr import ICRMonitor, Protocol, icr, make_views
from mlflow_icr.cli import main
from mlflow_icr.extraction.adapters import FunctionDenoiser, adapt, adapt_pipeline
from mlflow_icr.extraction.flow import FlowDenoiser
from mlflow_icr.extraction.latents import LatentDenoiser
from mlflow_icr.extraction.pipelines import load_denoiser
from mlflow_icr.extraction.taps import Tap, resolve_layer
from tests import tiny_models
from tests.training import errors_of

MAKERS: dict[str, Callable[[Path], Any]] = {
    "stable_diffusion": tiny_models.stable_diffusion,
    "stable_diffusion_xl": tiny_models.stable_diffusion_xl,
    "stable_diffusion_3": tiny_models.stable_diffusion_3,
    "flux": tiny_models.flux,
    "dit": tiny_models.dit,
}
SIDE = 16


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (12, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def latents(count: int = 2) -> Tensor:
    return torch.randn(count, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(1))


def flow_by_denoiser(denoiser: Any, z: Tensor, sigmas: Tensor) -> Tensor:
    """Euler's method on z_t = (1 - t) x_0 + t noise, by clean images alone."""
    for t, following in pairwise(sigmas.tolist()):
        velocity = (z - denoiser(z / (1 - t), t / (1 - t))) / t
        z = z + (following - t) * velocity
    return z


def ddim_by_denoiser(denoiser: Any, z: Tensor, scheduler: Any) -> Tensor:
    """Song et al. 2021, equation 12, without noise."""
    spacing = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    for t in scheduler.timesteps.tolist():
        a = scheduler.alphas_cumprod[t]
        b = scheduler.alphas_cumprod[t - spacing] if t >= spacing else scheduler.final_alpha_cumprod
        clean = denoiser(z / a.sqrt(), ((1 - a) / a).sqrt())
        z = b.sqrt() * clean + (1 - b).sqrt() * (z - a.sqrt() * clean) / (1 - a).sqrt()
    return z


def euler_by_denoiser(denoiser: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for sigma, following in pairwise(sigmas.tolist()):
        x = x + (following - sigma) * (x - denoiser(x, sigma)) / sigma
    return x


@torch.no_grad()
def sampled(name: str, pipeline: Any, denoiser: Any) -> tuple[Tensor, Tensor]:
    """Where the pipeline's own sampling ends, and where it ends by the denoiser, from the same latents."""
    z, common = latents(), {"output_type": "latent", "return_dict": False}
    prompt = [""] * len(z)
    if name == "dit":
        pipeline.scheduler.set_timesteps(4)
        found = denoiser.decode(ddim_by_denoiser(denoiser, z, pipeline.scheduler))
        # it takes no latents of its own, and draws them from a generator
        theirs = pipeline(
            [5, 5], guidance_scale=1.0, num_inference_steps=4, output_type="pt", return_dict=False,
            generator=torch.Generator().manual_seed(1),
        )[0]  # fmt: skip
        return theirs, (found / 2 + 0.5).clamp(0, 1)
    if name == "stable_diffusion":
        theirs = pipeline(prompt, SIDE, SIDE, guidance_scale=1.0, num_inference_steps=4, latents=z, **common)[0]
        return theirs, ddim_by_denoiser(denoiser, z, pipeline.scheduler)
    if name == "stable_diffusion_xl":
        theirs = pipeline(
            prompt, height=SIDE, width=SIDE, guidance_scale=1.0, num_inference_steps=4, latents=z, **common
        )[0]  # fmt: skip
        return theirs, euler_by_denoiser(denoiser, z * pipeline.scheduler.init_noise_sigma, pipeline.scheduler.sigmas)
    flow = {"height": SIDE, "width": SIDE, "guidance_scale": 1.0, "sigmas": [0.9, 0.5, 0.2], "num_inference_steps": 3}
    if name == "stable_diffusion_3":
        theirs = pipeline(prompt, latents=z, **flow, **common)[0]
        return theirs, flow_by_denoiser(denoiser, z, pipeline.scheduler.sigmas)
    packed = pipeline._pack_latents(z, len(z), 4, SIDE // 2, SIDE // 2)
    theirs = pipeline(prompt, latents=packed, **flow, **common)[0]
    ours = flow_by_denoiser(denoiser, z, pipeline.scheduler.sigmas)
    return theirs, pipeline._pack_latents(ours, len(z), 4, SIDE // 2, SIDE // 2)


@pytest.mark.parametrize("name", MAKERS)
def test_sampling_by_the_denoiser_is_the_pipelines_own(pipelines: dict[str, Any], name: str) -> None:
    """Prompt, time, packing, guidance and prediction type: all that a pipeline does to its network goes into this."""
    pipeline = pipelines[name]
    theirs, ours = sampled(name, pipeline, adapt_pipeline(pipeline, side=SIDE))
    # Whole timesteps are found again from sigma to a hundredth. With a time that is off by ten, or another prompt, size,
    # guidance or class, these networks end between 6e-3 and 4 elsewhere.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", MAKERS)
def test_a_measurement_changes_nothing_and_does_not_depend_on_batches(
    pipelines: dict[str, Any], images: Tensor, name: str
) -> None:
    pipeline = pipelines[name]
    denoiser: Any = adapt_pipeline(pipeline, side=SIDE)
    if name == "flux":  # whose empty prompt is 512 tokens, and more work than all the rest
        condition = denoiser.denoiser._call
        condition.embeddings = condition.embeddings[:, :8]
    parts = [denoiser.network, pipeline.vae]
    weights = [{key: value.clone() for key, value in part.state_dict().items()} for part in parts]
    pipeline.vae.train()
    denoiser.network.train()
    flags = [module.training for part in parts for module in part.modules()]
    state = torch.get_rng_state()
    protocol = Protocol(num_views=8, projection=4)
    found = ICRMonitor(denoiser, images, protocol).measure(1).values
    # Smaller than the views of one image, and than the draws of its errors.
    split = ICRMonitor(denoiser, images, protocol, batch_size=5).measure(1).values if name == "dit" else found
    for part in parts:
        part.eval()
    assert flags == [True] * len(flags)
    assert torch.equal(torch.get_rng_state(), state)
    for part, before in zip(parts, weights, strict=True):
        assert all(torch.equal(before[key], value) for key, value in part.state_dict().items())
        assert all(p.grad is None for p in part.parameters())
    assert 0 < found["repr/icr"] < 1
    for key in ("repr/icr", "repr/view_error_ratio", "repr/trace_residual"):
        assert split[key] == pytest.approx(found[key], rel=1e-3), key
    z, sigma = latents(5), torch.tensor([0.1, 0.3, 1.0, 2.0, 9.0])
    with torch.no_grad():
        one_by_one = torch.cat([denoiser(z[i : i + 1], float(sigma[i])) for i in range(5)])
        torch.testing.assert_close(denoiser(z, sigma), one_by_one, rtol=1e-4, atol=1e-4)


def test_views_of_a_latent_model_are_augmented_as_pixels_and_noised_as_latents(
    pipelines: dict[str, Any], images: Tensor
) -> None:
    pipeline = pipelines["stable_diffusion"]
    denoiser = adapt_pipeline(pipeline, side=SIDE)
    assert isinstance(denoiser, LatentDenoiser)
    vae = pipeline.vae
    with torch.no_grad():  # the pipelines decode by latents / scaling_factor + shift_factor: this is its inverse
        expected = (vae.encode(images.float() / 127.5 - 1).latent_dist.mean - 0.1) * 0.7
    torch.testing.assert_close(denoiser.encode(images.float() / 127.5 - 1), expected)
    options: Any = {"num_views": 3, "seed": 5, "encode": denoiser.encode}
    views = make_views(images[:4], range(4), sigma=0.5, **options)
    clean = make_views(images[:4], range(4), sigma=0, **options)
    pixels = make_views(images[:4], range(4), sigma=0, num_views=3, seed=5)
    torch.testing.assert_close(clean, denoiser.encode(pixels.flatten(0, 1)).view(4, 3, 4, 8, 8))
    noise = (views - clean) / 0.5
    assert noise.std() == pytest.approx(1, abs=0.05)
    again = torch.cat([make_views(images[i : i + 1], [i], sigma=0.5, **options) for i in range(4)])
    torch.testing.assert_close(again, views, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layer", "path"),
    [
        ("stable_diffusion", "encoder", "down_blocks.1"),
        ("stable_diffusion", "middle", "mid_block"),
        ("stable_diffusion", "last", "up_blocks.1"),
        ("dit", "encoder", "transformer_blocks.0"),
        ("stable_diffusion_3", "middle", "transformer_blocks.1"),
        ("stable_diffusion_3", "last", "transformer_blocks.2"),
        ("flux", "mid-1", "transformer_blocks.1"),
        ("flux", "decoder", "single_transformer_blocks.0"),
        ("flux", "last", "single_transformer_blocks.1"),
    ],
)
def test_aliases_name_blocks_and_blocks_of_two_streams_give_the_images(
    pipelines: dict[str, Any], name: str, layer: str, path: str
) -> None:
    denoiser = adapt_pipeline(pipelines[name], side=SIDE)
    assert resolve_layer(denoiser.network, layer) == path
    with Tap(denoiser.network, layer) as tap:
        features = tap(lambda: denoiser(latents(3), 0.3))
    assert features.shape[0] == 3
    if path.startswith(("transformer", "single")) and name != "dit":
        seen = []
        handle = denoiser.network.get_submodule(path).register_forward_hook(lambda *a: seen.append(a[-1]))
        with torch.no_grad():
            denoiser(latents(3), 0.3)
        handle.remove()
        text, image = seen[0]
        assert image.shape[1] == 16  # 8 x 8 latents in patches of 2 x 2
        assert text is None or text.shape[1] != 16
        torch.testing.assert_close(features, image.mean(1))


def test_a_network_without_a_middle_block_has_a_decoder_too() -> None:
    unet = tiny_models.text_unet(mid_block_type=None)
    assert [resolve_layer(unet, layer) for layer in ("middle", "decoder", "mid+2")] == [
        "down_blocks.1", "up_blocks.0", "up_blocks.1",
    ]  # fmt: skip


def test_the_best_flow_denoiser_of_a_gaussian_is_its_closed_form() -> None:
    """For clean images of variance c^2 the best velocity is linear in z_t, and D(x, sigma) = c^2 / (c^2 + sigma^2) x."""
    c = 0.5

    class Best(nn.Module):
        def forward(self, z: Tensor, time: Tensor) -> Tensor:
            t = (time / 200).view(-1, 1, 1, 1)
            return (t - (1 - t) * c**2) / ((1 - t) ** 2 * c**2 + t**2) * z

    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.05, 0.29, 1.0, 20.0])
    expected = c**2 / (c**2 + sigma**2).view(-1, 1, 1, 1) * x
    torch.testing.assert_close(FlowDenoiser(Best(), time_scale=200)(x, sigma), expected, rtol=1e-4, atol=1e-5)


def test_any_function_is_a_denoiser(small_unet: nn.Module, digits: Tensor) -> None:
    def denoise(x: Tensor, sigma: Tensor | float) -> Tensor:
        return x - sigma * small_unet(x, 0).sample

    report = ICRMonitor(FunctionDenoiser(denoise, small_unet), digits, Protocol(num_views=4)).measure(0)
    assert 0 < report.values["repr/icr"] < 1
    with pytest.raises(ValueError, match="network is a function; expected the torch module"):
        FunctionDenoiser(denoise)


def write(folder: Path, images: Tensor) -> str:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    return str(folder)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "flux"])
def test_a_saved_pipeline_is_loaded_as_it_was(pipelines: dict[str, Any], tmp_path: Path, name: str) -> None:
    pipelines[name].save_pretrained(tmp_path)
    state = torch.get_rng_state()
    loaded, side = load_denoiser(tmp_path, resolution=SIDE)
    assert torch.equal(torch.get_rng_state(), state)
    assert side == SIDE == load_denoiser(tmp_path)[1]
    with torch.no_grad():
        torch.testing.assert_close(loaded(latents(), 0.3), adapt_pipeline(pipelines[name], side=SIDE)(latents(), 0.3))


def test_a_saved_pipeline_is_measured_by_the_command(
    pipelines: dict[str, Any], images: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = pipelines["flux"]
    pipeline.save_pretrained(tmp_path / "saved")
    command = ["measure", "--pipeline", str(tmp_path / "saved"), "--data", write(tmp_path / "data", images)]
    command += ["--resolution", str(SIDE), "--num-views", "8", "--num-images", "10", "--layer", "first"]
    # Errors are some hundred passes of 512 tokens: here one of each image and view will do.
    with errors_of(10):
        assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    monitor = ICRMonitor(adapt_pipeline(pipeline, side=SIDE), images, Protocol("first", num_images=10, num_views=8))
    assert found["protocol_digest"] == monitor.protocol.digest
    features = monitor.reader.read(monitor._networks["repr"], 0.29)
    assert found["repr/icr"] == pytest.approx(icr(features).icr, rel=1e-4)


def test_weights_of_eight_bits_say_the_same_in_the_first_digits(pipelines: dict[str, Any], tmp_path: Path) -> None:
    pipelines["stable_diffusion_xl"].save_pretrained(tmp_path)
    whole, half = (load_denoiser(tmp_path, dtype=dtype)[0] for dtype in ("float32", "bfloat16"))
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    pixels = torch.rand(3, 3, SIDE, SIDE) * 2 - 1
    assert isinstance(half, LatentDenoiser)
    assert isinstance(whole, LatentDenoiser)
    assert torch.equal(half.encode(pixels), whole.encode(pixels))  # an autoencoder stays as it was saved
    with torch.no_grad():
        torch.testing.assert_close(half(latents(), 0.3), whole(latents(), 0.3), rtol=0.05, atol=0.05)


def test_what_cannot_be_loaded_is_refused_in_one_line(
    pipelines: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved"
    pipelines["stable_diffusion"].save_pretrained(saved)

    def refused(place: object, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load_denoiser(place, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    refused(saved, "dtype is 'half'; expected one of float32, bfloat16, float16", dtype="half")
    refused(saved, "device is 'tpu9', which is not here", device="tpu9")
    refused(saved, "resolution is 17; expected a multiple of 2 pixels", resolution=17)
    refused(saved, "class_label is 3; expected none", class_label=3)
    refused(tmp_path, "expected a diffusers folder with unet/ and scheduler/")
    index = json.loads((saved / "model_index.json").read_text())

    def with_index(**changes: Any) -> None:
        (saved / "model_index.json").write_text(json.dumps(index | changes))

    with_index(unet=["diffusers", "UNet3DConditionModel"])
    refused(saved, "checkpoint has the network UNet3DConditionModel; expected one of UNet2DModel, ")
    with_index(text_encoder=["my_code", "Encoder"])
    refused(saved, "checkpoint's text_encoder is a Encoder of 'my_code'; expected one of diffusers' or transformers'")
    with_index()
    for part in ("text_encoder", "unet"):  # weights that would have to be unpickled
        (weights,) = (saved / part).glob("*.safetensors")
        torch.save({}, weights.with_suffix(".bin"))
        weights.rename(tmp_path / "away")
        refused(saved, "which diffusers does not load")
        (tmp_path / "away").rename(weights)
    assert main(["measure", str(saved), "--data", str(tmp_path), "--output-dir", "x"]) == 2
    assert "output_dir is 'x'; expected none without --generated or --checkpoints" in capsys.readouterr().err


def test_a_name_on_the_hub_that_cannot_be_had_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["measure", "--pipeline", "nobody/nothing", "--data", str(tmp_path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mlflow-icr: error:")]
    assert "'nobody/nothing', which is no folder here, and cannot be downloaded from the hub" in line
    assert main(["measure", "nobody/nothing", "--data", str(tmp_path)]) == 2  # a checkpoint is a folder
    assert "'nobody/nothing'; expected a diffusers folder with unet/ and scheduler/" in capsys.readouterr().err


def test_networks_and_schedulers_that_do_not_fit_are_refused(pipelines: dict[str, Any]) -> None:
    from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, ScoreSdeVeScheduler

    unet = pipelines["stable_diffusion"].unet
    with pytest.raises(ValueError, match="the scheduler is a ScoreSdeVeScheduler; expected DDPMScheduler or one of its kind"):
        adapt(unet, ScoreSdeVeScheduler())
    with pytest.raises(ValueError, match="timestep_type 'continuous'; expected discrete"):
        adapt(unet, EulerDiscreteScheduler(timestep_type="continuous"))
    with pytest.raises(ValueError, match="prediction_type 'v_prediction'; expected epsilon"):
        adapt(unet, EDMEulerScheduler(prediction_type="v_prediction"))
    inpainting = type(pipelines["stable_diffusion"])(
        **(pipelines["stable_diffusion"].components | {"unet": tiny_models.text_unet(in_channels=9)}),
        requires_safety_checker=False,
    )
    with pytest.raises(ValueError, match="takes 9 channels, and the autoencoder makes 4"):
        adapt_pipeline(inpainting, side=SIDE)
    with pytest.raises(ValueError, match="class_label is 6; expected 0 to 5, which means none"):
        adapt_pipeline(pipelines["dit"], side=SIDE, class_label=6)

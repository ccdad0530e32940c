"""LoRA fine-tuning of a text-to-image model: watched in the script's loop, and on its checkpoints afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from mlflow_icr import ICRMonitor, Protocol
from mlflow_icr.extraction.adapters import adapt_pipeline
from mlflow_icr.extraction.taps import Tap
from mlflow_icr.integrations.backfill import measure_checkpoints
from mlflow_icr.integrations.lora import few_images_protocol, lora_watch
from mlflow_icr.monitoring.series import read_history
from tests import tiny_models

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("few_errors")
BATCH, SIDE = 4, 16


@pytest.fixture
def pipeline(tmp_path: Path) -> Any:
    return tiny_models.stable_diffusion(tmp_path / "tokenizer", DDPMScheduler(beta_schedule="scaled_linear"))


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (12, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def with_lora(unet: Any) -> Any:
    unet.requires_grad_(False)
    torch.manual_seed(0)
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    return unet


def train(pipeline: Any, images: Tensor, steps: int) -> Any:
    """The loop of diffusers' train_text_to_image_lora.py, without its options; yields after each step."""
    unet, generator = pipeline.unet, torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=3e-2)
    for step in range(steps):
        unet.train()
        pixels = images[torch.arange(step * BATCH, (step + 1) * BATCH) % len(images)].float() / 127.5 - 1
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
            tokens = pipeline.tokenizer(
                ["ab"] * BATCH, padding="max_length", max_length=tiny_models.LENGTH, return_tensors="pt"
            ).input_ids
            text = pipeline.text_encoder(tokens)[0]
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.randint(0, 1000, (BATCH,), generator=generator)
        found = unet(pipeline.scheduler.add_noise(latents, noise, t), t, text).sample
        torch.nn.functional.mse_loss(found, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield (step + 1) * BATCH


def parts(pipeline: Any) -> tuple[Any, ...]:
    return pipeline.unet, pipeline.scheduler, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer


def test_a_lora_is_watched_while_it_is_trained(pipeline: Any, images: Tensor, tmp_path: Path) -> None:
    with_lora(pipeline.unet)
    base = {key: v.clone() for key, v in pipeline.unet.state_dict().items() if "lora" not in key}
    twin = copy.deepcopy(pipeline.unet)
    features = []

    def look(watch: Any) -> None:
        x = torch.ones(2, 4, 8, 8)
        with Tap(watch.denoiser.network, "decoder") as tap:
            features.append(tap(lambda: watch.denoiser(x, 0.3)))

    with lora_watch(*parts(pipeline), images, tmp_path / "out", schedule=[4, 16]) as watch:
        watch(0)
        look(watch)
        for images_seen in train(pipeline, images, 4):
            assert not watch(images_seen)
        look(watch)
        trainable = [key for key, p in pipeline.unet.named_parameters() if p.requires_grad]
        assert trainable
        assert all("lora" in key for key in trainable)
    rows = read_history(tmp_path / "out")
    assert [row["images_seen"] for row in rows] == [4, 16]
    assert rows[0]["repr/icr"] != rows[1]["repr/icr"]
    assert rows[0]["repr/view_error_ratio"] != rows[1]["repr/view_error_ratio"]
    assert (features[0] - features[1]).abs().max() > 1e-4
    assert all(torch.equal(base[key], v) for key, v in pipeline.unet.state_dict().items() if key in base)
    # The same training without a watch ends with the same LoRA.
    alone = copy.copy(pipeline)
    alone.unet = twin
    for _ in train(alone, images, 4):
        pass
    assert all(torch.equal(v, pipeline.unet.state_dict()[key]) for key, v in twin.state_dict().items())
    # What was read is the pipeline's own network, unconditionally.
    protocol = few_images_protocol(len(images), 16)
    again = ICRMonitor(adapt_pipeline(pipeline, side=SIDE), images, protocol, batch_size=16).measure(16)
    assert again.values["repr/view_error_ratio"] == pytest.approx(rows[1]["repr/view_error_ratio"], rel=1e-5)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert "LoRA fine-tuning" in run.data.tags["icr.experimental"]
    assert run.data.params["protocol.num_views"] == "54"


def test_a_handful_of_images_is_read_in_many_views() -> None:
    for count, dim in ((2, 1280), (5, 1280), (20, 320), (500, 1280), (12, 8)):
        p = few_images_protocol(count, dim).resolve(images=count, dim=dim)
        assert p.num_views is not None
        assert p.projection is not None
        # Where there are three images and more, the debiased ICR exists: nu > D + 1 of the projection.
        assert (count - 1) * (p.num_views - 1) > p.projection + 1
    with pytest.raises(ValueError, match="num_images is 1; expected at least 2"):
        few_images_protocol(1, 8)


def test_parts_that_do_not_fit_are_refused(pipeline: Any, images: Tensor, tmp_path: Path) -> None:
    others = parts(pipeline)[1:]
    with pytest.raises(ValueError, match="unet is a AutoencoderKL; expected a UNet2DConditionModel"):
        lora_watch(pipeline.vae, *others, images, tmp_path / "out")
    with pytest.raises(ValueError, match="unet takes 9 channels, and the autoencoder makes 4"):
        lora_watch(tiny_models.text_unet(in_channels=9), *others, images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_a_lora_are_measured_on_the_pipeline_that_it_began_with(
    pipeline: Any, images: Tensor, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "base")
    unet, expected, protocol = with_lora(pipeline.unet), [], Protocol(num_views=8, projection=4)
    monitor = ICRMonitor(adapt_pipeline(pipeline, side=SIDE), images, protocol, batch_size=16)
    for images_seen in train(pipeline, images, 2):
        checkpoint = tmp_path / "lora" / f"checkpoint-{images_seen // BATCH}"
        checkpoint.mkdir(parents=True)
        state = peft.get_peft_model_state_dict(unet)
        StableDiffusionPipeline.save_lora_weights(checkpoint, unet_lora_layers=state)
        expected.append(monitor.measure(images_seen).values)
    (tmp_path / "data").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "data" / f"{i:02d}.png")
    found = measure_checkpoints(
        tmp_path / "lora", tmp_path / "data", pipeline=tmp_path / "base", images_per_step=BATCH, protocol=protocol,
        resolution=SIDE,
    )  # fmt: skip
    assert found.measured == [4, 8]
    for row, values in zip(read_history(tmp_path / "lora" / "icr"), expected, strict=True):
        for key in ("repr/icr", "repr/view_error_ratio", "repr/icr_rise"):
            assert row[key] == pytest.approx(values[key], rel=1e-4, abs=1e-6), key

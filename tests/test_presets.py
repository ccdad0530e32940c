"""Presets are the paper's experiments, and configurations that cannot be are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mlflow_icr.extraction.latents import load_autoencoder
from tests.family_runs import SIT, as_folder, configured, tiny_autoencoder, weights
from trainers.config import load_config, preset_names
from trainers.families import family_of
from trainers.loop import train
from trainers.run import Run

# Presets, and what is refused


def test_presets_are_the_papers_networks() -> None:
    sizes = {}
    for name in preset_names():
        config = load_config(name, {})
        channels = 4 if config.network.autoencoder else 1 if "mnist" in name or name == "digits" else 3
        with torch.device("meta"):
            network = family_of(config, 1000).build(
                channels, config.data.resolution // (8 if config.network.autoencoder else 1)
            )
        sizes[name] = sum(p.numel() for p in network.parameters()) / 1e6
    assert 125 < sizes["imagenet256-sit-b2-20k"] < 135  # SiT-B/2 has 130M (Ma et al. 2024, table 1)
    assert 250 < sizes["imagenet64-10k"] < 350  # ADM has 296M (Karras et al. 2022, table 7)
    assert sizes["cifar10-50k"] == sizes["cifar10-4096"]
    assert max(sizes[name] for name in sizes if name.startswith("fashion-mnist")) < 3
    sit, rich = load_config("imagenet256-sit-b2-20k", {}), load_config("cifar10-50k", {})
    assert sit.protocol().num_images == sit.data.num_images == 20_000
    assert sit.monitor.sigmas == (0.2 / 0.8,)
    assert 0.5 ** (256 / (1000 * sit.optimizer.ema_halflife_kimg)) == pytest.approx(0.9999, abs=1e-6)
    poor = load_config("cifar10-4096", {})
    differs = {key for key, value in rich.flat().items() if poor.flat()[key] != value}
    assert differs == {"preset", "num_images", "num_heldout"}


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("imagenet64-10k", {"block_channels": [16, 16], "attention_resolutions": [4], "layers_per_block": 1, "resolution": 8}),
        ("imagenet256-sit-b2-20k", {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "resolution": 16}),
    ],
)
def test_presets_take_a_folder_of_classes(
    tmp_path: Path, rng: np.random.Generator, preset: str, changes: dict[str, Any]
) -> None:
    for label in range(3):
        (tmp_path / "data" / f"n{label}").mkdir(parents=True)
        for i in range(4 + label):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / f"n{label}" / f"{i}.png")
    if "sit" in preset:
        tiny_autoencoder(3, blocks=4).save_pretrained(tmp_path / "vae")
        changes = changes | {"autoencoder": str(tmp_path / "vae")}
    small = {"num_images": 9, "num_heldout": 3, "batch_size": 4, "encoder": "pixels", "num_samples": 2, "sample_steps": 2}
    assert load_config(preset, {}).optimizer.compile  # for GPUs: what they are fast with
    small |= {"compile": False, "mixed_precision": "no"}
    config = load_config(preset, {**small, **changes, "data": str(tmp_path / "data"), "probe_images": 9})
    run = Run(config, tmp_path / "run")
    assert torch.bincount(run.data.train_labels).tolist() == [3, 3, 3]
    assert run.family.num_classes == 3
    before = weights(run.state.ema)
    for _ in range(2):  # zero-initialised blocks move after the output has
        next(train(run.state, run.inputs, run.family, run.accelerator))
    assert not torch.equal(weights(run.state.ema), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "gan"}, "family is 'gan'; expected one of edm, ddpm, flow"),
        ({"family": "ddpm", "prediction": "x"}, "prediction is 'x'; expected one of epsilon, v"),
        ({"family": "ddpm", "beta_schedule": "cosine"}, "beta_schedule is 'cosine'; expected one of linear"),
        ({"family": "ddpm", "sigma_data": 0.75}, "sigma_data is 0.75; expected nothing for family ddpm: it is of edm"),
        ({"prediction": "v"}, "prediction is 'v'; expected nothing for family edm: it is of ddpm"),
        ({"hidden_size": 64}, "hidden_size is 64; expected nothing for a U-Net: it is of a transformer"),
        ({**SIT, "block_channels": [8]}, r"block_channels is \(8,\); expected nothing for a transformer: it is of a U-Net"),
        ({"transformer": True}, "transformer is True; expected nothing for family edm: it is of ddpm"),
        ({**SIT, "hidden_size": 36}, "hidden_size is 36; expected a multiple of 8, four times num_heads"),
        ({**SIT, "patch_size": 3}, "resolution is 8; expected a multiple of patch_size, 3"),
        ({"label_dropout": 0}, r"label_dropout is 0.0; expected a number in \(0, 1\)"),
    ],
)  # fmt: skip
def test_impossible_families_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("digits", changes)


def test_data_and_autoencoders_that_do_not_fit_are_refused(tmp_path: Path, digits: Tensor) -> None:
    flat = as_folder(digits[:12], tmp_path / "flat")
    small = {"num_images": 8, "num_heldout": 2}
    with pytest.raises(ValueError, match=r"labels is True, but data '.*flat' has no classes; expected subfolders"):
        Run(configured("flow-labels", data=str(flat), **small), tmp_path)
    with pytest.raises(ValueError, match="balanced is True, but the data has no classes; expected subfolders"):
        Run(configured("flow", data=str(flat), balanced=True, **small), tmp_path)
    with pytest.raises(ValueError, match="autoencoder is 'nowhere'; expected a folder of diffusers' AutoencoderKL"):
        Run(configured("flow", autoencoder="nowhere"), tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ValueError, match=r"autoencoder is '.*other', of class 'VQModel'; expected"):
        load_autoencoder(tmp_path / "other")
    for name, channels, blocks in (("colour", 3, 2), ("deep", 1, 5), ("half", 1, 3)):
        tiny_autoencoder(channels, blocks).save_pretrained(tmp_path / name)
    for name, message in (
        ("colour", "for images of 3 channels; expected one for 1, as 'digits' has"),
        ("deep", "resolution is 8; expected a multiple of 16, of which the autoencoder '.*deep' makes one"),
        ("half", "resolution is 8, which makes latents of 2x2; expected a multiple of patch_size, 4"),
    ):
        with pytest.raises(ValueError, match=message):
            Run(configured("flow", autoencoder=str(tmp_path / name), patch_size=4 if name == "half" else 2), tmp_path)

"""Shared by the tests of model families: small configurations, runs of them, and plain diffusers in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from mlflow_icr import Report
from trainers.config import TrainConfig, load_config
from trainers.console import Console
from trainers.families import Family, family_of
from trainers.loop import TrainState, new_state
from trainers.run import Run

UNET = {"block_channels": [16, 32]}
SIT = {"family": "flow", "hidden_size": 32, "num_layers": 3, "num_heads": 2}
DDPM = UNET | {"family": "ddpm"}
FAMILIES: dict[str, dict[str, Any]] = {
    "edm-labels": UNET | {"labels": True},
    "ddpm": DDPM,
    "ddpm-v-labels": DDPM | {"prediction": "v", "labels": True},
    "flow": SIT,
    "flow-labels": SIT | {"labels": True},
}
SHORT = {"num_images": 64, "num_heldout": 32, "batch_size": 32, "total_kimg": 0.32, "first_measurement_kimg": 0.16}
SHORT |= {"measurements": 2, "num_samples": 8, "sample_steps": 3, "probe_views": 4, "rampup_kimg": 0}


def configured(name: str, **changes: Any) -> TrainConfig:
    return load_config("digits", {**SHORT, **FAMILIES[name], **changes})


def started(config: TrainConfig, shape: tuple[int, int, int] = (1, 8, 8)) -> tuple[Family, TrainState, Accelerator]:
    family, accelerator = family_of(config, 10), Accelerator(cpu=True)
    return family, new_state(family.build(*shape[:2]), config, accelerator), accelerator


def weights(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def tiny_autoencoder(channels: int = 1, blocks: int = 2, seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        latent_channels=2,
        norm_num_groups=4,
        scaling_factor=0.7,
        shift_factor=0.1,
    )


class RecordedRun(Run):
    """A run that keeps the rows of its measurements, which a tracker would have."""

    rows: list[dict[str, float]]

    def __init__(self, config: TrainConfig, folder: Path, **options: Any) -> None:
        super().__init__(config, folder, **options)
        self.rows = []

    def measure(self, judged: bool) -> Report:
        report = super().measure(judged)
        self.rows = [row for row in self.rows if row["images_seen"] < report.step] + [report.flat()]
        return report


def finished(config: TrainConfig, folder: Path) -> RecordedRun:
    run = RecordedRun(config, folder)
    assert run.train_to_end(None, Console(config, shown=False), lambda: False) == "FINISHED"
    return run


def as_folder(images: Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:03d}.png")
    return folder


SAMPLE = """
import json, sys
sys.modules["mlflow_icr"] = sys.modules["trainers"] = None  # neither can be imported
import torch, diffusers
found = {}
for folder in sys.argv[2:]:
    stock = json.load(open(folder + "/model_index.json"))["_class_name"]
    trust = {} if isinstance(stock, str) else {"trust_remote_code": True}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **trust)
    if type(pipeline.scheduler).__name__ == "DDPMScheduler":  # the ODE, for comparison
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    labels = {"class_labels": [10, 10, 10]} if "labels" in folder else {}
    images = pipeline(batch_size=3, num_inference_steps=40, generator=torch.manual_seed(3), output_type="pt", **labels)
    found[folder] = [type(pipeline).__name__, images.images.tolist()]
json.dump(found, open(sys.argv[1], "w"))
"""


def sampled_by_diffusers(tmp_path: Path, *folders: Path) -> dict[str, tuple[str, Tensor]]:
    """What a fresh process makes of each folder, 3 images, with nothing of ours but what is in the folder."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SAMPLE, str(tmp_path / "found.json"), *map(str, folders)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    return {Path(folder).name: (kind, torch.tensor(images)) for folder, (kind, images) in found.items()}

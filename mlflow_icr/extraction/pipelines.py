"""Saved pipelines: a diffusers folder as a denoiser."""

from __future__ import annotations

import json
from pathlib import Path

from mlflow_icr.extraction.denoisers import EDMDenoiser


def load_denoiser(folder: Path | str) -> tuple[EDMDenoiser, int]:
    """The denoiser of an EDM pipeline's folder (safetensors, nothing unpickled), and the side of its images in pixels.

    Raises ValueError when the folder holds no `unet/`, no EDM scheduler, or weights in another format.
    """
    from diffusers import UNet2DModel

    folder = Path(folder)
    if not (folder / "unet" / "config.json").exists():
        raise ValueError(f"checkpoint is {str(folder)!r}; expected a diffusers folder with unet/ and scheduler/")
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    if not str(scheduler.get("_class_name", "")).startswith("EDM"):
        raise ValueError(f"checkpoint has the scheduler {scheduler.get('_class_name')!r}; expected one of EDM's")
    network = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True)
    return EDMDenoiser(network.eval(), float(scheduler["sigma_data"])), int(network.config["sample_size"])

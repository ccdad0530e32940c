"""Saved pipelines: a diffusers folder as a denoiser."""

from __future__ import annotations

import json
from pathlib import Path

from mlflow_icr.extraction.denoisers import EDMDenoiser, SchedulerDenoiser

# Whose noise is that of training: betas and a prediction type say all.
VARIANCE_PRESERVING = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)


def load_denoiser(folder: Path | str) -> tuple[EDMDenoiser | SchedulerDenoiser, int]:
    """The denoiser of an unconditional pipeline's folder (safetensors, nothing unpickled), and its images' side in pixels.

    The scheduler says which one: EDM's, or a variance-preserving one (DDPM, DDIM, ...) with epsilon, sample or v prediction.
    Raises ValueError when the folder holds no `unet/`, another scheduler, or weights in another format.
    """
    from diffusers import UNet2DModel

    folder = Path(folder)
    if not (folder / "unet" / "config.json").exists():
        raise ValueError(f"checkpoint is {str(folder)!r}; expected a diffusers folder with unet/ and scheduler/")
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    name = str(scheduler.get("_class_name", ""))
    if not name.startswith("EDM") and name not in VARIANCE_PRESERVING:
        allowed = ", ".join(("EDM's", *VARIANCE_PRESERVING))
        raise ValueError(f"checkpoint has the scheduler {name!r}; expected one of {allowed}")
    network = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True).eval()
    side = int(network.config["sample_size"])
    if name.startswith("EDM"):
        return EDMDenoiser(network, float(scheduler["sigma_data"])), side
    import diffusers
    import torch

    with torch.random.fork_rng(devices=[]):  # diffusers draws from the global generator here
        made = getattr(diffusers, name).from_config(scheduler)
    return SchedulerDenoiser(network, made), side

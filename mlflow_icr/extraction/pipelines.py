"""Saved pipelines: a diffusers folder as a denoiser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mlflow_icr.extraction.denoisers import EDMDenoiser, SchedulerDenoiser
from mlflow_icr.extraction.flow import FlowDenoiser
from mlflow_icr.extraction.latents import LatentDenoiser, load_autoencoder

# Whose noise is that of training: betas and a prediction type say all.
VARIANCE_PRESERVING = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
NULL_CLASS = "_null_class"  # in model_index.json: which class of a U-Net stands for none
NETWORKS = {"unet": "UNet2DModel", "transformer": "DiTTransformer2DModel"}  # by folder

SavedDenoiser = EDMDenoiser | SchedulerDenoiser | FlowDenoiser | LatentDenoiser


def load_denoiser(folder: Path | str) -> tuple[SavedDenoiser, int]:
    """The denoiser of a pipeline's folder (safetensors, nothing unpickled, no code run), and its images' side in pixels.

    The scheduler says which one: EDM's, a variance-preserving one (DDPM, DDIM, ...) with epsilon, sample or v prediction, or
    flow matching. A model of classes is read with its null class, one of latents with the autoencoder in `vae/`. Raises
    ValueError when the folder holds no `unet/` or `transformer/`, another scheduler, or weights in another format.
    """
    folder = Path(folder)
    part = next((name for name in NETWORKS if (folder / name / "config.json").exists()), None)
    if part is None:
        raise ValueError(f"checkpoint is {str(folder)!r}; expected a diffusers folder with unet/ and scheduler/")
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    name = str(scheduler.get("_class_name", ""))
    if not name.startswith("EDM") and name not in (*VARIANCE_PRESERVING, *FLOW_MATCHING):
        allowed = ", ".join(("EDM's", *VARIANCE_PRESERVING, *FLOW_MATCHING))
        raise ValueError(f"checkpoint has the scheduler {name!r}; expected one of {allowed}")
    network = _network(folder, part)
    side, null_class = int(network.config["sample_size"]), _null_class(folder, part, network)
    denoiser: EDMDenoiser | SchedulerDenoiser | FlowDenoiser
    if name.startswith("EDM"):
        denoiser = EDMDenoiser(network, float(scheduler["sigma_data"]), null_class=null_class)
    elif name in FLOW_MATCHING:
        scale = float(scheduler.get("num_train_timesteps", 1000))
        denoiser = FlowDenoiser(network, time_scale=scale, null_class=null_class)
    else:
        import diffusers

        with torch.random.fork_rng(devices=[]):  # diffusers draws from the global generator here
            made = getattr(diffusers, name).from_config(scheduler)
        denoiser = SchedulerDenoiser(network, made, null_class=null_class)
    if not (folder / "vae" / "config.json").exists():
        return denoiser, side
    autoencoder = load_autoencoder(folder / "vae")
    return LatentDenoiser(denoiser, autoencoder), side * autoencoder.factor


def image_channels(denoiser: SavedDenoiser) -> int:
    """C, of the images that a saved denoiser is for."""
    if isinstance(denoiser, LatentDenoiser):
        return denoiser.autoencoder.channels
    network: Any = denoiser.network
    return int(network.config["in_channels"])


def _network(folder: Path, part: str) -> Any:
    import diffusers

    return getattr(diffusers, NETWORKS[part]).from_pretrained(folder / part, use_safetensors=True).eval()


def _null_class(folder: Path, part: str, network: Any) -> int | None:
    """The null class of a network of classes; None for one without. Raises ValueError for a U-Net that has none."""
    if part == "transformer":  # a DiT's table always ends with it
        return int(network.config["num_embeds_ada_norm"])
    if network.config["num_class_embeds"] is None:
        return None
    path = folder / "model_index.json"
    found = json.loads(path.read_text()).get(NULL_CLASS) if path.exists() else None
    if not isinstance(found, int):
        raise ValueError(f"checkpoint is {str(folder)!r}, a U-Net of classes; expected {NULL_CLASS} in its model_index.json")
    return found

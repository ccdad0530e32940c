"""Checkpoints: a diffusers folder of the averaged weights, and beside it all that training needs to go on.

`checkpoints/<images seen>/` is complete or not there: it is written under another name, synced, and renamed. Everything is
safetensors and JSON; nothing is unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlflow_icr.tracking.checkpoints import checkpoint_path, write_checkpoint
from trainers.config import TrainConfig
from trainers.loop import TrainState

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE, PROGRESS = "state.safetensors", "progress.json"
KEPT_STATES = 2  # the newest, and the one before it in case the newest cannot be read


def _tensors(state: TrainState, accelerator: Accelerator, monitor: dict[str, Tensor]) -> dict[str, Tensor]:
    network = accelerator.unwrap_model(state.network)
    tensors = {f"network/{key}": value for key, value in network.state_dict().items()}
    tensors |= {f"ema/{key}": value for key, value in state.ema.state_dict().items()}
    for index, entry in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": torch.as_tensor(value) for key, value in entry.items()}
    tensors |= {f"monitor/{key}": value for key, value in monitor.items()}
    tensors["loss_sum"] = state.loss_sum
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def save_checkpoint(
    output_dir: Path, state: TrainState, config: TrainConfig, accelerator: Accelerator, monitor: dict[str, Tensor]
) -> Path:
    """Write the checkpoint of a state, on the main process; returns its folder. Raises OSError when the disk is full."""
    from diffusers import ConsistencyModelPipeline, EDMDPMSolverMultistepScheduler

    folder = checkpoint_path(output_dir, state.images_seen)
    if (folder / STATE).exists():
        return folder

    def write(part: Path) -> None:
        # Plain diffusers loads and samples this; with DDPMPipeline it would run and be wrong.
        scheduler = EDMDPMSolverMultistepScheduler(sigma_data=config.sigma_data)
        ConsistencyModelPipeline(unet=state.ema, scheduler=scheduler).save_pretrained(part)
        save_file(_tensors(state, accelerator, monitor), part / STATE)
        progress = {"images_seen": state.images_seen, "loss_steps": state.loss_steps}
        (part / PROGRESS).write_text(json.dumps(progress))

    write_checkpoint(output_dir, state.images_seen, write)
    for old in sorted(output_dir.glob(f"checkpoints/[0-9]*/{STATE}"))[:-KEPT_STATES]:
        old.unlink()
    return folder


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that training can go on from, or None."""
    found = sorted(output_dir.glob(f"checkpoints/[0-9]*/{STATE}"))
    return found[-1].parent if found else None


def load_checkpoint(folder: Path, state: TrainState, accelerator: Accelerator) -> dict[str, Tensor]:
    """Put a state back to what a checkpoint holds; returns the monitor's part. Raises ValueError when it does not fit."""
    tensors = load_file(folder / STATE)
    progress = json.loads((folder / PROGRESS).read_text())

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    try:
        accelerator.unwrap_model(state.network).load_state_dict(part("network/"))
        state.ema.load_state_dict(part("ema/"))
    except RuntimeError as error:
        raise ValueError(f"{folder} does not hold this configuration's network ({str(error).splitlines()[0]})") from None
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in part("optimizer/").items():
        index, name = key.split("/")
        entries.setdefault(int(index), {})[name] = value
    saved = state.optimizer.state_dict()
    state.optimizer.load_state_dict({"state": entries, "param_groups": saved["param_groups"]})
    state.images_seen = progress["images_seen"]
    state.loss_sum = tensors["loss_sum"].to(accelerator.device)
    state.loss_steps = progress["loss_steps"]
    return part("monitor/")

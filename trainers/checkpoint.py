"""Checkpoints: a diffusers folder of the averaged weights, and beside it all that training needs to go on.

`checkpoints/<images seen>/` is complete or not there: it is written under another name, synced, and renamed. Everything is
safetensors and JSON; nothing is unpickled. What a disk has done to it since is seen by its SHA-256: the one before is taken.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlflow_icr.extraction.files import file_sha256, sync_folder
from mlflow_icr.extraction.latents import Autoencoder
from mlflow_icr.tracking.checkpoints.folder import checkpoint_path, write_checkpoint
from trainers.engine import bare, gathered, load_whole, shared_like
from trainers.families import Family
from trainers.loop import TrainState

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

STATE, PROGRESS = "state.safetensors", "progress.json"
AUTOENCODER = "autoencoder"
KEPT_STATES = 2  # the newest, and the one before it in case the newest cannot be read


def state_tensors(
    state: TrainState, accelerator: Accelerator, monitor: dict[str, Tensor], losses: Tensor | None = None
) -> dict[str, Tensor]:
    """All that training needs to go on, by name, on the CPU; where parameters are sharded, every rank must take part.

    `losses` (ranks,) are the sums of losses of all ranks, if there are several.
    """
    network = bare(state.network, accelerator)
    tensors = {f"network/{key}": value for key, value in network.state_dict().items()}
    tensors |= {f"ema/{key}": value for key, value in state.ema.state_dict().items()}
    for index, entry in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": torch.as_tensor(value) for key, value in entry.items()}
    tensors |= {f"monitor/{key}": value for key, value in monitor.items()}
    tensors["loss_sum"] = state.loss_sum.reshape(1) if losses is None else losses
    return {key: gathered(value.detach()).cpu().contiguous().clone() for key, value in tensors.items()}


def place_autoencoder(folder: Path, autoencoder: Autoencoder, output_dir: Path) -> None:
    """Put the autoencoder into a pipeline's folder as `vae/`: one copy in `output_dir`, to which the checkpoints' are links."""
    kept = output_dir / AUTOENCODER
    if not kept.exists():
        part = kept.with_name(f".{AUTOENCODER}.part")
        shutil.rmtree(part, ignore_errors=True)
        autoencoder.network.save_pretrained(part)
        for path in [*part.rglob("*"), part]:
            sync_folder(path)
        part.rename(kept)
    try:
        shutil.copytree(kept, folder / "vae", copy_function=os.link)
    except OSError:  # a file system without hard links; shutil.Error is an OSError too
        shutil.rmtree(folder / "vae", ignore_errors=True)
        shutil.copytree(kept, folder / "vae")


def _write_state(part: Path, state: TrainState, accelerator: Accelerator, tensors: dict[str, Tensor], batch_size: int) -> None:
    save_file(tensors, part / STATE)
    progress: dict[str, Any] = {"images_seen": state.images_seen, "loss_steps": state.loss_steps}
    progress |= {"optimizer_steps": state.optimizer_steps, "origin_images_seen": state.origin_images_seen}
    progress |= {"skipped_steps": int(state.skipped[0]), "batch_size": batch_size}
    if accelerator.scaler is not None:  # of fp16: plain numbers
        progress["scaler"] = accelerator.scaler.state_dict()
    progress["sha256"] = file_sha256(part / STATE)
    (part / PROGRESS).write_text(json.dumps(progress))


def save_checkpoint(
    output_dir: Path,
    state: TrainState,
    family: Family,
    accelerator: Accelerator,
    tensors: dict[str, Tensor],
    autoencoder: Autoencoder | None = None,
) -> Path:
    """Write the checkpoint of a state, on the main process; returns its folder. Raises OSError when the disk is full.

    `tensors` are those of `state_tensors`. Raises ValueError when some are not finite: training cannot go on from there.
    """
    if not_finite := [key for key, value in tensors.items() if key != "loss_sum" and not value.isfinite().all()]:
        raise ValueError(f"{not_finite[0]} is not finite; expected a state that training can go on from")
    folder = checkpoint_path(output_dir, state.images_seen)
    if (folder / STATE).exists() and _is_intact(folder):
        return folder

    def write(part: Path) -> None:
        family.save(part, state.ema, latent=autoencoder is not None)
        if autoencoder is not None:
            place_autoencoder(part, autoencoder, output_dir)
        _write_state(part, state, accelerator, tensors, family.config.optimizer.batch_size)

    try:
        write_checkpoint(output_dir, state.images_seen, write)
    except SafetensorError as error:  # its way to tell of a full disk
        raise OSError(str(error)) from error
    for old in sorted(output_dir.glob(f"checkpoints/[0-9]*/{STATE}"))[:-KEPT_STATES]:
        old.unlink()
    return folder


def _is_intact(folder: Path) -> bool:
    """Whether a checkpoint that training could go on from is what was written; one that is not is told of."""
    try:
        intact = json.loads((folder / PROGRESS).read_text())["sha256"] == file_sha256(folder / STATE)
    except (OSError, ValueError, KeyError):
        intact = False
    if not intact:
        logger.warning("%s is damaged; it is not used", folder)
    return intact


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that training can go on from, or None. Raises ValueError when there are only damaged ones."""
    found = sorted((path.parent for path in output_dir.glob(f"checkpoints/[0-9]*/{STATE}")), reverse=True)
    newest = next((folder for folder in found if _is_intact(folder)), None)
    if found and newest is None:
        raise ValueError(f"output_dir is {str(output_dir)!r}, whose checkpoints are damaged; expected one to go on from")
    return newest


def load_checkpoint(
    folder: Path, state: TrainState, accelerator: Accelerator, batch_size: int | None = None
) -> dict[str, Tensor]:
    """Put a state back to what a checkpoint holds; returns the monitor's part. Raises ValueError when it does not fit.

    With another `batch_size` than the checkpoint's, the state's origin is here; None stands for the same.
    """
    tensors = load_file(folder / STATE)
    progress = json.loads((folder / PROGRESS).read_text())

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    try:
        load_whole(bare(state.network, accelerator), part("network/"))
        state.ema.load_state_dict(part("ema/"))
    except RuntimeError as error:
        raise ValueError(f"{folder} does not hold this configuration's network ({str(error).splitlines()[0]})") from None
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in part("optimizer/").items():
        index, name = key.split("/")
        entries.setdefault(int(index), {})[name] = value
    saved = state.optimizer.state_dict()
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    for place, entry in entries.items():  # moments are shared out as their parameters are; a count of steps is not
        like = parameters[place]
        entries[place] = {k: shared_like(v, like) if v.shape == like.shape else v for k, v in entry.items()}
    state.optimizer.load_state_dict({"state": entries, "param_groups": saved["param_groups"]})
    if accelerator.scaler is not None and "scaler" in progress:
        accelerator.scaler.load_state_dict(progress["scaler"])
    state.images_seen = progress["images_seen"]
    saved_size = progress.get("batch_size", batch_size or 1)  # older checkpoints do not say these
    same = batch_size in (None, saved_size) or not state.images_seen
    state.optimizer_steps = progress.get("optimizer_steps", state.images_seen // saved_size)
    state.origin_images_seen = progress.get("origin_images_seen", 0) if same else state.images_seen
    state.skipped[0] = progress.get("skipped_steps", 0)
    sums, ranks = tensors["loss_sum"].reshape(-1), accelerator.num_processes
    mine = sums[accelerator.process_index] if len(sums) == ranks else sums.mean()  # the same mean, on another number of ranks
    state.loss_sum = mine.to(accelerator.device)
    state.loss_steps = progress["loss_steps"]
    return part("monitor/")

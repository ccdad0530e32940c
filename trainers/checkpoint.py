"""Checkpoints: a diffusers folder of the averaged weights, and in it everything that training needs to resume.

`checkpoints/<images seen>/` is complete or absent: it is written under another name, synced, and renamed. Everything is
safetensors and JSON; nothing is unpickled. A damaged checkpoint is recognised by its SHA-256, and the one before it is used.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from mlflow_icr.extraction.averages import SNAPSHOTS
from mlflow_icr.extraction.files import file_sha256, fsync_path
from mlflow_icr.extraction.latents import Autoencoder
from mlflow_icr.tracking.checkpoints.folder import checkpoint_path, checkpoints, write_checkpoint
from trainers.augment_labels import without_label_layer
from trainers.engine import bare, gathered, load_whole, local, share_of, shared_like
from trainers.families import Family
from trainers.loop import TrainState
from trainers.sharded import read_entire, write_shares

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

STATE, PROGRESS = "state.safetensors", "progress.json"
SHARES = "shares"  # the folder of sharded tensors, which ranks hold together
AUTOENCODER = "autoencoder"
KEPT_STATES = 2  # the newest, and the one before it in case the newest cannot be read


def named_tensors(
    state: TrainState,
    accelerator: Accelerator,
    monitor: dict[str, Tensor],
    losses: Tensor | None = None,
    curve: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors that training resumes from, by name, on their devices; sharded parameters are this rank's DTensors.

    `losses` (ranks,) are the sums of losses of all ranks, if there are several, and `curve` is the mean of the ranks' sums.
    """
    network = bare(state.network, accelerator)
    parameters = dict(network.named_parameters())

    def placed(shares: list[Tensor]) -> list[Tensor]:
        pairs = zip(shares, parameters.values(), strict=True)
        return [share_of(share, like) if isinstance(like, DTensor) else share for share, like in pairs]

    tensors = {f"network/{key}": value for key, value in network.state_dict().items()}
    average = state.ema.state_dict() if state.shares is None else dict(zip(parameters, placed(state.shares), strict=True))
    tensors |= {f"ema/{key}": value for key, value in average.items()}
    for index, entry in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": torch.as_tensor(value) for key, value in entry.items()}
    for std, power in state.powers.items():
        tensors |= {f"power/{std:g}/{name}": value for name, value in zip(parameters, placed(power), strict=True)}
    tensors |= {f"monitor/{key}": value for key, value in monitor.items()}
    tensors["loss_sum"] = state.loss_sum.reshape(1) if losses is None else losses
    tensors["curve"] = state.curve if curve is None else curve
    return {key: value.detach() for key, value in tensors.items()}


def entire_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU; sharded tensors are gathered, and every rank must call this."""
    return {key: gathered(value).cpu().contiguous().clone() for key, value in tensors.items()}


def state_tensors(state: TrainState, accelerator: Accelerator, monitor: dict[str, Tensor]) -> dict[str, Tensor]:
    """`named_tensors` of a training, unsharded, on the CPU; if parameters are sharded, every rank must call this."""
    return entire_tensors(named_tensors(state, accelerator, monitor))


def not_finite(tensors: dict[str, Tensor]) -> str:
    """The name of a tensor with values that are not finite on this rank (sums of losses excepted); empty if there is none."""
    sums = ("loss_sum", "curve")
    return next((key for key, value in tensors.items() if key not in sums and not local(value).isfinite().all()), "")


def place_autoencoder(folder: Path, autoencoder: Autoencoder, output_dir: Path) -> None:
    """Put the autoencoder into a pipeline's folder as `vae/`: hard links to one copy in `output_dir`."""
    original = output_dir / AUTOENCODER
    if not original.exists():
        part = original.with_name(f".{AUTOENCODER}.part")
        shutil.rmtree(part, ignore_errors=True)
        autoencoder.network.save_pretrained(part)
        for path in [*part.rglob("*"), part]:
            fsync_path(path)
        part.rename(original)
    try:
        shutil.copytree(original, folder / "vae", copy_function=os.link)
    except OSError:  # a file system without hard links; shutil.Error is an OSError too
        shutil.rmtree(folder / "vae", ignore_errors=True)
        shutil.copytree(original, folder / "vae")


def _write_progress(
    part: Path, state: TrainState, accelerator: Accelerator, batch_size: int, data_sha256: Sequence[str]
) -> None:
    progress: dict[str, Any] = {"images_seen": state.images_seen, "loss_steps": state.loss_steps}
    progress |= {"curve_steps": state.curve_steps, "optimizer_steps": state.optimizer_steps}
    progress |= {"origin_images_seen": state.origin_images_seen}
    progress |= {"skipped_steps": int(state.skipped[0]), "batch_size": batch_size}
    if accelerator.scaler is not None:  # fp16's, whose state is plain numbers
        progress["scaler"] = accelerator.scaler.state_dict()
    progress["data_sha256"] = list(data_sha256)
    progress["sha256"] = file_sha256(part / STATE)
    progress["shares"] = {path.name: file_sha256(path) for path in sorted((part / SHARES).glob("*"))}
    (part / PROGRESS).write_text(json.dumps(progress))


def _write_snapshots(part: Path, state: TrainState, family: Family, tensors: dict[str, Tensor]) -> None:
    """The power-function averages as the folder's components have them, for `mlflow-icr ema`."""
    network, content = copy.deepcopy(state.ema).cpu(), dict[str, Tensor]()
    for std in state.powers:
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(tensors[f"power/{std:g}/{name}"])
        for component, module in family.components(without_label_layer(network)).items():
            content |= {f"{std:g}/{component}/{key}": value.clone() for key, value in module.state_dict().items()}
    save_file(content, part / SNAPSHOTS)


def is_saved(output_dir: Path, images_seen: int) -> bool:
    """Whether there is a checkpoint at so many images seen from which training could resume."""
    folder = checkpoint_path(output_dir, images_seen)
    return (folder / STATE).exists() and _is_intact(folder)


def save_checkpoint(
    output_dir: Path,
    state: TrainState,
    family: Family,
    accelerator: Accelerator,
    tensors: dict[str, Tensor],
    autoencoder: Autoencoder | None = None,
    shares: dict[str, Tensor] | None = None,
    data_sha256: Sequence[str] = (),
) -> Path:
    """Write the checkpoint of a state, on the main process; returns its folder. Raises OSError when the disk is full.

    `tensors` are unsharded. With `shares`, which ranks hold together, the other ranks must call `save_shares` at the same time,
    and `state.ema` must be unsharded. `data_sha256` are the hashes of the images, for `check_data`.
    """

    def write(part: Path) -> None:
        family.save(part, state.ema, latent=autoencoder is not None)
        if autoencoder is not None:
            place_autoencoder(part, autoencoder, output_dir)
        if state.powers and state.images_seen:
            _write_snapshots(part, state, family, tensors)
        save_file(tensors, part / STATE)
        if shares is not None:
            save_shares(part, accelerator, shares)
        _write_progress(part, state, accelerator, family.config.optimizer.batch_size, data_sha256)

    try:
        folder = write_checkpoint(output_dir, state.images_seen, write)
    except SafetensorError as error:  # safetensors' error for a full disk
        raise OSError(str(error)) from error
    for old in sorted(output_dir.glob(f"checkpoints/[0-9]*/{STATE}"))[:-KEPT_STATES]:
        old.unlink()
        shutil.rmtree(old.with_name(SHARES), ignore_errors=True)
    return folder


def save_shares(part: Path, accelerator: Accelerator, shares: dict[str, Tensor]) -> None:
    """Write this rank's shares into a checkpoint that the main process has begun at `part`; every rank must call this."""
    accelerator.wait_for_everyone()  # now the folder is there
    write_shares(shares, part / SHARES)


def remove_between(output_dir: Path, measured: Collection[int]) -> None:
    """Remove checkpoints that were saved between measurements, except the newest ones: they serve only to resume."""
    folders = checkpoints(output_dir)
    for images_seen, folder in list(folders.items())[:-KEPT_STATES]:
        if images_seen not in measured:
            discarded = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(discarded, ignore_errors=True)
            folder.rename(discarded)
            shutil.rmtree(discarded, ignore_errors=True)


def _is_intact(folder: Path) -> bool:
    """Whether a checkpoint is as it was written; a damaged one is logged."""
    try:
        progress = json.loads((folder / PROGRESS).read_text())
        digests = {folder / STATE: progress["sha256"]}
        digests |= {folder / SHARES / name: digest for name, digest in progress.get("shares", {}).items()}
        intact = all(file_sha256(path) == digest for path, digest in digests.items())
    except (OSError, ValueError, KeyError):
        intact = False
    if not intact:
        logger.warning("%s is damaged; it is not used", folder)
    return intact


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint from which training can resume, or None. Raises ValueError if all are damaged."""
    folders = sorted((path.parent for path in output_dir.glob(f"checkpoints/[0-9]*/{STATE}")), reverse=True)
    newest = next((folder for folder in folders if _is_intact(folder)), None)
    if folders and newest is None:
        raise ValueError(f"output_dir is {str(output_dir)!r}, whose checkpoints are damaged; expected one to resume from")
    return newest


def check_data(folder: Path, data: str, data_sha256: Sequence[str]) -> None:
    """Raise ValueError if a checkpoint was trained on other images than those with these hashes."""
    saved = json.loads((folder / PROGRESS).read_text()).get("data_sha256")
    if saved and saved != list(data_sha256):
        which = "training" if saved[0] != data_sha256[0] else "held-out"
        raise ValueError(
            f"data is {data!r}, whose {which} images are not those of the run to resume, by their SHA-256; expected the same"
        )


def _load_averages(state: TrainState, accelerator: Accelerator, average: dict[str, Tensor], powers: dict[str, Tensor]) -> None:
    """Load the averages other than `state.ema`: power-function averages and, with sharding, this rank's share."""
    named = list(bare(state.network, accelerator).named_parameters())
    targets = [(shares, f"{std:g}/", powers) for std, shares in state.powers.items()]
    targets += [] if state.shares is None else [(state.shares, "", average)]
    for shares, prefix, tensors in targets:
        for (name, parameter), share in zip(named, shares, strict=True):
            if prefix + name not in tensors:
                raise RuntimeError(f"there is no average {prefix}{name}")
            share.copy_(local(shared_like(tensors[prefix + name], parameter)))


def load_checkpoint(
    folder: Path, state: TrainState, accelerator: Accelerator, batch_size: int | None = None
) -> dict[str, Tensor]:
    """Load a checkpoint into a state; returns the monitor's part. Raises ValueError if it does not fit.

    If `batch_size` differs from the checkpoint's, the state's origin is here; None means the same batch size.
    """
    tensors = load_file(folder / STATE)
    if (folder / SHARES).is_dir():
        tensors |= read_entire(folder / SHARES)
    progress = json.loads((folder / PROGRESS).read_text())

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    try:
        load_whole(bare(state.network, accelerator), part("network/"))
        state.ema.load_state_dict(part("ema/"))
        _load_averages(state, accelerator, part("ema/"), part("power/"))
    except RuntimeError as error:
        raise ValueError(f"{folder} does not hold this configuration's network ({str(error).splitlines()[0]})") from None
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in part("optimizer/").items():
        index, name = key.split("/")
        entries.setdefault(int(index), {})[name] = value
    saved = state.optimizer.state_dict()
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    for place, entry in entries.items():  # moments are sharded like their parameters; the count of steps is not
        like = parameters[place]
        entries[place] = {k: shared_like(v, like) if v.shape == like.shape else v for k, v in entry.items()}
    state.optimizer.load_state_dict({"state": entries, "param_groups": saved["param_groups"]})
    if accelerator.scaler is not None and "scaler" in progress:
        accelerator.scaler.load_state_dict(progress["scaler"])
    state.images_seen = progress["images_seen"]
    saved_size = progress.get("batch_size", batch_size or 1)  # older checkpoints do not have these
    same = batch_size in (None, saved_size) or not state.images_seen
    state.optimizer_steps = progress.get("optimizer_steps", state.images_seen // saved_size)
    state.origin_images_seen = progress.get("origin_images_seen", 0) if same else state.images_seen
    state.skipped[0] = progress.get("skipped_steps", 0)
    if "curve" in tensors:
        state.curve.copy_(tensors["curve"])
        state.curve_steps = progress.get("curve_steps", 0)
    sums, ranks = tensors["loss_sum"].reshape(-1), accelerator.num_processes
    local_sum = (
        sums[accelerator.process_index] if len(sums) == ranks else sums.mean()
    )  # the same mean, on another number of ranks
    state.loss_sum.copy_(local_sum)
    state.loss_steps = progress["loss_steps"]
    return part("monitor/")

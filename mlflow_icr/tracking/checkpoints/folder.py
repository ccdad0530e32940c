"""`checkpoints/` of an output folder: a diffusers folder for each number of images seen, and which of them to keep.

A folder is complete or absent: it is written, and removed, under another name. `turning.json` names the one to keep.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from mlflow_icr.extraction.files import fsync_path, write_whole
from mlflow_icr.monitoring.verdict import Verdict

FOLDER, TURNING, INDEX = "checkpoints", "turning.json", "model_index.json"
CODE = "pipeline.py"  # of a pipeline that diffusers has no class for

# Which weights a tracker uploads: those of all measured checkpoints, of those that a run keeps at its end, or none.
ALL, KEPT, NONE = "all", "kept", "none"
LOG_MODELS = (ALL, KEPT, NONE)


def check_log_models(log_models: str) -> None:
    """Raise ValueError unless `log_models` is one of its allowed values."""
    if log_models not in LOG_MODELS:
        raise ValueError(f"log_models is {log_models!r}; expected one of {', '.join(LOG_MODELS)}")


def check_register(name: str, log_models: str | None) -> None:
    """Raise ValueError for an impossible name of a registered model, or if no weights are logged for it."""
    if not name.strip() or set(name) & set("/:\"'%.\\"):
        raise ValueError(f"register is {name!r}; expected the name of a registered model, without / : . % and quotes")
    if log_models == NONE:
        raise ValueError(f"register is {name!r} and log_models 'none'; expected log_models {ALL} or {KEPT}")


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a diffusers pipeline."""
    return (folder / INDEX).is_file() or (folder / "unet" / "config.json").is_file()


def pipeline_files(folder: Path) -> list[Path]:
    """The files of a diffusers folder, without those that training resumes from."""
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and (path.parent != folder or path.name in (INDEX, CODE))
    )  # fmt: skip


def copy_pipeline(folder: Path, to: Path) -> None:
    """Copy the pipeline of a folder, without its other files, to a new or empty folder."""
    for path in pipeline_files(folder):
        target = to / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def checkpoint_path(output_dir: Path, images_seen: int) -> Path:
    """The folder of the checkpoint at so many images seen."""
    return output_dir / FOLDER / f"{images_seen:012d}"


def part_of(folder: Path) -> Path:
    """The folder of a checkpoint while it is written."""
    return folder.with_name(f".{folder.name}.part")


def write_checkpoint(output_dir: Path, images_seen: int, write: Callable[[Path], object]) -> Path:
    """Make a checkpoint by `write`, which gets an empty folder; it is complete on disk when this returns. Raises OSError."""
    folder = checkpoint_path(output_dir, images_seen)
    part = part_of(folder)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    for path in [*part.rglob("*"), part]:
        fsync_path(path)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    fsync_path(folder.parent)
    return folder


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """The checkpoints of an output folder by images seen, oldest first."""
    folders = sorted(output_dir.glob(f"{FOLDER}/[0-9]*"))
    return {int(path.name): path for path in folders if path.name.isdecimal() and is_pipeline(path)}


def mark_turning(output_dir: Path, verdict: Verdict) -> None:
    """Write `checkpoints/turning.json`, which names the checkpoint to keep, once a verdict has found a turn."""
    if verdict.turned_at is None:
        return
    content = verdict.summary() | {"state": verdict.state, "checkpoint": f"{verdict.checkpoint_images_seen:012d}"}
    text = json.dumps(content, indent=2) + "\n"
    write_whole(output_dir / FOLDER / TURNING, lambda file: file.write(text.encode()))


def remove_old(output_dir: Path, limit: int, keep: Collection[int]) -> list[int]:
    """Remove the oldest checkpoints until `limit` are left, but never the newest, nor those in `keep`; 0 is no limit.

    Returns what was removed, in images seen. More than `limit` stay where more than so many are to be kept.
    """
    saved = checkpoints(output_dir)
    spared = {*keep, max(saved, default=0)}
    surplus = len(saved) - limit if limit else 0
    removed = [images_seen for images_seen in saved if images_seen not in spared][: max(0, surplus)]
    for images_seen in removed:
        doomed = saved[images_seen].with_name(f".{saved[images_seen].name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(saved[images_seen], doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return removed

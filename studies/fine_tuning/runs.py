"""The runs of the study: their images, their training with the watch beside it, and how much each checkpoint copies."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mlflow_icr.extraction.files import write_whole
from mlflow_icr.extraction.images import load_folder
from mlflow_icr.generation import memorization_ratio
from mlflow_icr.integrations.checkpoint_files import entries_of
from mlflow_icr.integrations.saved import SavedTraining
from mlflow_icr.monitoring.series import HISTORY, read_history

SIDE = 8
SCRIPT = Path(__file__).with_name("tune.py")
SAMPLES, STEPS = 256, 25  # images drawn of each checkpoint, in so many steps of DDIM
COUNTS = (32, 128, 512)  # images that are fine-tuned on
LENGTHS = (65_536, 98_304, 98_304)  # images seen of each


@dataclass(frozen=True)
class FineTuning:
    """One fine-tuning: `method` is full or lora, on so many images of a class, until so many have been seen."""

    method: str
    num_images: int
    images_seen: int

    @property
    def name(self) -> str:
        """The name of its folder and of its results."""
        return f"{self.method}-n{self.num_images}"


def all_runs(images_seen: Sequence[int] = LENGTHS) -> list[FineTuning]:
    """Full fine-tuning and LoRA on 32, 128 and 512 images, the fewest first."""
    lengths = dict(zip(COUNTS, images_seen, strict=True))
    return [FineTuning(method, count, seen) for count, seen in lengths.items() for method in ("full", "lora")]


def write_images(archive: Path, folder: Path, target: str, counts: Sequence[int]) -> None:
    """Images of `SIDE` pixels as PNG: `rest` has all classes but the target, `n<count>` the first images of the target."""
    with zipfile.ZipFile(archive) as opened:
        names = sorted(name for name in opened.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png")))
        classes = sorted({name.split("/")[-2] for name in names})
        if target not in classes:
            raise ValueError(f"target is {target!r}; expected one of {', '.join(classes)}")
        of_target = [name for name in names if name.split("/")[-2] == target]
        sets = {"rest": [name for name in names if name.split("/")[-2] != target]}
        sets |= {f"n{count}": of_target[:count] for count in counts}
        for kind, chosen in sets.items():
            if (folder / kind).exists():
                continue
            part = folder / f".{kind}"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            for i, name in enumerate(chosen):
                with Image.open(io.BytesIO(opened.read(name))) as image:
                    image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX).save(part / f"{i:05d}.png")
            part.rename(folder / kind)


def pretrain(work: Path, images_seen: int) -> Path:
    """The pipeline that all runs begin with, trained once."""
    base = work / "base"
    if not (base / "model_index.json").exists():
        _python(str(SCRIPT), str(work / "data" / "rest"), str(base), "--images-seen", str(images_seen))
    return base


def tune_and_watch(run: FineTuning, work: Path, base: Path) -> Path:
    """Train a run, with `mlflow-icr watch` beside it; both are as they would be started by hand. Returns the run's folder."""
    folder, data = work / run.name, work / "data" / f"n{run.num_images}"
    done = folder / "done"
    if done.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    watch = ["-m", "mlflow_icr.cli", "watch", "--checkpoints", str(folder), "--data", str(data), "--base", str(base)]
    lora = ["--lora"] if run.method == "lora" else []
    watcher = subprocess.Popen([sys.executable, *watch, "--follow", "--settle", "2", "--poll", "1"], env=_environment())
    try:
        _python(str(SCRIPT), str(data), str(folder), "--images-seen", str(run.images_seen), "--base", str(base), *lora)
        watcher.terminate()  # it would wait for more; the next one measures what is left, and ends
        if watcher.wait() != 0:
            raise OSError(f"the watch on {run.name} ended with status {watcher.returncode}")
    except BaseException:
        watcher.kill()
        raise
    _python(*watch, "--settle", "2")
    done.write_text("")
    return folder


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, env=_environment())


def copies(run: FineTuning, work: Path, base: Path) -> list[dict[str, float]]:
    """The share of copies among samples of the base and of each checkpoint, with its interval, by images seen."""
    data = load_folder(work / "data" / f"n{run.num_images}", SIDE).float().flatten(1) / 255
    training = SavedTraining(base)
    shares = [_share(0, training, data)]
    for entry in entries_of(work / run.name):
        if entry.checkpoint is not None:
            training.load(entry.checkpoint)
            shares.append(_share(entry.checkpoint.position.count, training, data))
    return sorted(shares, key=lambda row: row["images_seen"])


def _share(images_seen: int, training: SavedTraining, data: Tensor) -> dict[str, float]:
    ratio = memorization_ratio(sampled(training.denoiser.network).flatten(1), data)
    return {"images_seen": images_seen, "copies": ratio.value, "low": ratio.low, "high": ratio.high}


@torch.no_grad()
def sampled(network: Any) -> Tensor:
    """Images (N, 3, side, side) in [0, 1], by diffusers' own DDIM, of the same noise whatever the network."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample_range=1.0)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(SAMPLES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).sample, t, x).prev_sample
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 255


def keep_results(run: FineTuning, work: Path, base: Path, results: Path) -> None:
    """Write a run's result, a small file: its history as the watch has it, and the copies of each checkpoint."""
    path = results / f"{run.name}.json"
    if path.exists():
        return
    history = work / run.name / "icr" / HISTORY
    rows = [_kept(row) for row in read_history(history)]
    content = {"method": run.method, "num_images": run.num_images, "history": rows, "copies": copies(run, work, base)}
    text = json.dumps(content).replace("}, {", "},\n{") + "\n"  # a line for each row
    write_whole(path, lambda file: file.write(text.encode()))


def _kept(row: Mapping[str, float]) -> dict[str, float]:
    """The values of a row that a verdict may read, to eight digits."""
    kept = {key: float(f"{value:.8g}") for key, value in row.items() if key.startswith("repr")}
    return {"images_seen": int(row["images_seen"])} | kept

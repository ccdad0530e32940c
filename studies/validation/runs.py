"""The runs of the validation study: which there are, and a worker pool that trains those whose results are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mlflow_icr.monitoring.series import HISTORY
from trainers.launchers.processes import environment
from trainers.train import CONFIG

LABEL_FREE = "alignment,uniformity,rankme,effective_rank,lidar"


@dataclass(frozen=True)
class ValidationRun:
    """One training run of the study. `rich` runs have so many images that nothing is copied within their budget."""

    preset: str
    num_images: int
    seed: int
    total_kimg: float
    rich: bool

    @property
    def name(self) -> str:
        """Of the run, and of its folder."""
        return f"{self.preset}-{'rich' if self.rich else 'limited'}-n{self.num_images}-seed{self.seed}"

    def flags(self, output_dir: Path) -> list[str]:
        """The command line of `trainers.train`."""
        return [
            f"--preset={self.preset}", f"--num-images={self.num_images}", f"--seed={self.seed}",
            f"--total-kimg={self.total_kimg:g}", "--measurements=20", "--probe-images=256", f"--companions={LABEL_FREE}",
            "--num-samples=128",
            "--encoder=pixels", "--generate-every=1",
            *([] if self.preset == "digits" else ["--resolution=12"]),
            f"--output-dir={output_dir}", f"--run-name={self.name}", "--tag=study=validation",
            f"--tag=role={'rich' if self.rich else 'limited'}",
        ]  # fmt: skip


def digits_runs() -> Iterator[ValidationRun]:
    """20 limited runs and 20 rich ones, each seed once."""
    # Copies of N digits begin after some 350 to 450 N images; the budgets go past that.
    limited = [(64, 36)] * 4 + [(128, 75)] * 6 + [(256, 150)] * 6 + [(512, 300)] * 4
    budgets = [120] * 14 + [240] * 6
    for seed in range(20):
        # 7 and 20 share no factor: sizes and budgets are mixed over the seeds, so that both halves of them hold all.
        num_images, kimg = limited[7 * seed % 20]
        yield ValidationRun("digits", num_images, 1000 + seed, kimg, rich=False)
        yield ValidationRun("digits", 1600, 2000 + seed, budgets[7 * seed % 20], rich=True)


def other_runs() -> Iterator[ValidationRun]:
    """Four limited and two rich runs of each other set, at 12x12."""
    for preset, rich_images in (("mnist5k", 4000), ("fashion-mnist", 8000)):
        for seed, (num_images, kimg) in enumerate([(64, 60), (128, 110), (64, 60), (128, 110)]):
            yield ValidationRun(preset, num_images, 1000 + seed, kimg, rich=False)
        for seed in range(2):
            yield ValidationRun(preset, rich_images, 2000 + seed, 110, rich=True)


def all_runs() -> list[ValidationRun]:
    """Every run, in the order in which they are trained: all sets have some before the long tail of digits."""
    digits = list(digits_runs())
    return [*digits[:10], *other_runs(), *digits[10:]]


def _train(run: ValidationRun, work: Path, results: Path, parallel: int) -> str | None:
    """Train one run, or go on with it, and keep its results; returns what went wrong."""
    folder = work / run.name
    resume = ["--resume"] if (folder / CONFIG).exists() else []
    log = work / f"{run.name}.log"
    store = f"sqlite:///{(work / 'mlflow.db').resolve()}"
    with log.open("a") as out:
        done = subprocess.run(
            [sys.executable, "-m", "trainers.train", *run.flags(folder), *resume],
            env={"MLFLOW_TRACKING_URI": store} | environment(parallel),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        last = log.read_text().strip().splitlines()[-1:]
        return f"{run.name}: exit status {done.returncode} ({''.join(last)}); all of it is in {log}"
    kept = results / run.name
    part = kept.with_name(f".{kept.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in (HISTORY, CONFIG):
        shutil.copyfile(folder / name, part / name)
    os.replace(part, kept)  # there is a whole result, or none
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return None


def train_missing(runs: Sequence[ValidationRun], work: Path, results: Path, parallel: int) -> list[str]:
    """Train the runs that have no results yet, `parallel` at a time; returns what went wrong, one line for each failure."""
    missing = [run for run in runs if not (results / run.name / HISTORY).exists()]
    work.mkdir(parents=True, exist_ok=True)
    told = threading.Lock()
    count = len(runs) - len(missing)

    def one(run: ValidationRun) -> str | None:
        nonlocal count
        failure = _train(run, work, results, parallel)
        with told:
            count += failure is None
            print(failure or f"{count}/{len(runs)} {run.name}", flush=True)
        return failure

    with ThreadPoolExecutor(parallel) as pool:
        return [failure for failure in pool.map(one, missing) if failure]

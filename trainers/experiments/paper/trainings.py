"""The trainings, one after the other: finished ones stay, stopped ones resume, and missing ones begin."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from mlflow_icr.monitoring.series import read_history
from trainers.config import TrainConfig, config_from, read_values
from trainers.experiments.paper.plan import Scale
from trainers.experiments.paper.preparations import prepare
from trainers.launchers.processes import environment
from trainers.train import CONFIG

Train = Callable[[Sequence[str], Path], int]


def is_done(folder: Path) -> bool:
    """Whether a run has trained to its end: its last measurement is at its length."""
    if not (folder / CONFIG).exists() or not (folder / "history.jsonl").exists():
        return False
    rows = read_history(folder)
    return bool(rows) and rows[-1]["images_seen"] >= config_of(folder).total_images


def config_of(folder: Path) -> TrainConfig:
    """The configuration of a run's folder."""
    return config_from(read_values(folder / CONFIG))


def in_a_process(flags: Sequence[str], log: Path) -> int:
    """Run `trainers.train` as a process; returns its exit status. Its output goes to a file."""
    with log.open("a") as out:
        command = [sys.executable, "-m", "trainers.train", *flags]
        return subprocess.run(
            command, env=environment(1), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        ).returncode


def train_missing(
    scale: Scale,
    root: Path,
    data: str,
    wants_stop: Callable[[], bool],
    echo: Callable[[str], None],
    train: Train = in_a_process,
) -> list[str]:
    """Train what has not ended, one after the other, each after its preparations; returns the names of those that failed.

    `train` takes the flags of `trainers.train` and a file for its output, and returns the exit status.
    """
    failed, runs = [], root / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for training in scale.trainings():
        folder = runs / training.name
        if is_done(folder):
            continue
        if wants_stop():
            break
        echo(f"training {training.name}: {training.images} images, {training.flags['total_kimg']:g} kimg")
        try:
            prepare(training, scale, data, root, wants_stop)
        except InterruptedError:
            break
        resume = ["--resume"] if (folder / CONFIG).exists() else []
        config_file = runs / f"{training.name}.yaml"
        config_file.write_text(yaml.safe_dump(training.config(data, root).grouped(), sort_keys=False))
        flags = [f"--config={config_file}", f"--output-dir={folder}", f"--run-name={training.name}", *resume]
        log = runs / f"{training.name}.log"
        status = train(flags, log)
        if status and not wants_stop():
            failed.append(training.name)
            echo(f"{training.name} failed with exit status {status}; {log} says why")
    return failed

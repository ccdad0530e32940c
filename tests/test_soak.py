"""A training that is killed at random moments ends as one that was not, to the last bit, on the disk and in both trackers.

`make soak` kills at least fifty times, on one rank and on two.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_tracking import as_float32, journal_scalars, mlflow_scalars, tensorboard_scalars
from tests.training import SHORT, measured, run

LAST = "checkpoints/000000001216/state.safetensors"


def marks(folder: Path) -> tuple[float, int]:
    """What changes when a training gets on: its journal, or its checkpoints."""
    history = folder / "history.jsonl"
    return history.stat().st_size if history.exists() else 0, len(list(folder.glob("checkpoints/*")))


def killed(folder: Path, chance: random.Random, ranks: int) -> bool:
    """Train on, and kill all processes at a random moment around a measurement; False where training had ended before."""
    command = [sys.executable, "-m", "trainers.train", *SHORT, f"--output-dir={folder}", f"--num-processes={ranks}"]
    if (folder / "config.yaml").exists():
        command.append("--resume")
    before, after = marks(folder), chance.uniform(0, 1.2)
    # A group of its own; torchrun's ranks have others, and end when it does.
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while marks(folder) == before and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        child.wait(after)
        return False
    except subprocess.TimeoutExpired:
        for process in processes_of(folder):
            os.kill(process, signal.SIGKILL)
        child.wait(60)
        return True


def processes_of(folder: Path) -> list[int]:
    """All processes, of all ranks, that train into a folder; the launcher first."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"--output-dir={folder}".encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return sorted(found)


def survive(folder: Path, whole: Path, chance: random.Random, kills: int, ranks: int = 1) -> int:
    """Train through so many kills, if it lasts that long, and compare with a run that had none; how many it had."""
    from mlflow import MlflowClient

    MlflowClient().search_runs(["0"])  # a fresh store is made before: one that is killed while it makes its tables is broken
    survived = 0
    while survived < kills and killed(folder, chance, ranks):
        survived += 1
    done = run(folder, "--resume", f"--num-processes={ranks}")
    assert done.returncode == 0, done.stderr
    assert measured(folder) == measured(whole)
    a, b = load_file(whole / LAST), load_file(folder / LAST)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    assert MlflowClient().get_run(run_id).info.status == "FINISHED"
    journal, shown, stored = journal_scalars(folder), tensorboard_scalars(folder), mlflow_scalars(run_id)
    assert {key: shown[key] for key in journal} == as_float32(journal)
    assert {key: stored[key] for key in journal} == journal
    return survived


linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@linux
def test_a_killed_training_is_as_one_that_was_not(whole: tuple[Path, str], tmp_path: Path) -> None:
    assert survive(tmp_path / "run", whole[0], random.Random(0), kills=1) >= 1


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 40), (2, 10)])
def test_soak(whole: tuple[Path, str], tmp_path: Path, ranks: int, kills: int) -> None:
    reference = whole[0]
    if ranks > 1:
        reference = tmp_path / "reference"
        done = run(reference, f"--num-processes={ranks}")
        assert done.returncode == 0, done.stderr
    chance, survived, folders = random.Random(1), 0, 0
    while survived < kills:
        survived += survive(tmp_path / f"run{folders}", reference, chance, kills - survived, ranks)
        folders += 1
    print(f"{survived} kills in {folders} trainings on {ranks} ranks")

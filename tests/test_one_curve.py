"""A run that is stopped, and goes on by the same line, longer and at another rate, shows one curve everywhere."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlflow_icr.tracking import read_history
from tests.test_tracking import as_float32, mlflow_scalars, tensorboard_scalars
from tests.training import SHORT, run


@pytest.mark.slow
def test_the_same_line_goes_on_with_one_curve(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    line = [f"--output-dir={tmp_path}", "--resume", "auto", "--curve-every=2"]
    child = subprocess.Popen([sys.executable, "-m", "trainers.train", *SHORT, *line], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    while not (tmp_path / "history.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    child.send_signal(signal.SIGUSR1)
    _, errors = child.communicate(timeout=400)
    assert child.returncode == 128 + signal.SIGUSR1, errors
    stopped = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal())
    done = run(tmp_path, *line[1:], "--total-kimg=1.6", "--learning-rate=5e-4")
    assert done.returncode == 0, done.stderr

    rows = read_history(tmp_path)
    assert rows[-1]["images_seen"] == 1600
    assert [row["train/optimizer_steps"] * 32 for row in rows] == [row["images_seen"] for row in rows]
    run_id = json.loads((tmp_path / "mlflow.json").read_text())["run_id"]
    (found,) = MlflowClient().search_runs(["0"])
    assert found.info.status == "FINISHED"
    assert found.data.tags["icr.changed.learning_rate"] == f"0.001 -> 0.0005 at {stopped} images"
    stored, shown = mlflow_scalars(run_id), tensorboard_scalars(tmp_path)
    for key in ("curve/loss", "curve/gradient_norm", "curve/images_per_second", "curve/learning_rate", "curve/memory_gib"):
        assert [step for step, _ in stored[key]] == list(range(64, 1601, 64)), key
        assert {key: sorted(shown[key])} == as_float32({key: stored[key]})
    rates = dict(stored["curve/learning_rate"])
    assert rates[1600] == pytest.approx(5e-4 * 0.8)  # of a ramp of 2 kimg
    assert [step for step, _ in stored["loss/train"]] == [int(row["images_seen"]) for row in rows if "loss/train" in row]

"""The benchmark of a CUDA device: what it says where there is none, and that its code runs."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

DEVICE = Path(__file__).parents[1] / "benchmarks" / "device.py"


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(DEVICE)])
    runpy.run_path(str(DEVICE), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    assert said == ["device benchmark: not run, there is no CUDA device (--device cpu --tiny tries the code)"]
    monkeypatch.setattr(sys, "argv", [str(DEVICE), "--device=cpu"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(DEVICE), run_name="__main__")
    assert "--device is 'cpu'; expected --tiny with it" in capsys.readouterr().err


def test_its_loops_run_in_tiny() -> None:
    """In a process of its own: Accelerate keeps a precision for the whole of one."""
    command = [sys.executable, str(DEVICE), "--device=cpu", "--tiny", "--batch-size=8", "--rounds=1", "--steps=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(DEVICE.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(\S+), batch 8: trainer \d+ images/s, bare loop \d+, ratio (\S+) ", done.stdout)
    assert [name for name, _ in found] == ["cifar10-4096", "imagenet256-sit-b2-20k"]
    assert all(float(ratio) > 0 for _, ratio in found)
    assert "a measurement of 16 images in 2 views" in done.stdout


def test_a_set_takes_hardly_more_than_its_bytes() -> None:
    """600 images of 256x256, 112 MiB: a copy of them all would be one too many."""
    command = [sys.executable, str(DEVICE.with_name("host_memory.py")), "--images=600", "--side=256"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(DEVICE.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = re.search(r"MiB, .* MiB (\S+) \(goal", done.stdout)
    assert found is not None
    assert float(found[1]) < 1.9  # batches and threads weigh more here than with 5 000 of 512x512

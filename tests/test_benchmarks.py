"""Benchmarks: the page is what the results file says; the one of a CUDA device says where there is none, and its code runs."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results

DEVICE = Path(__file__).parents[1] / "benchmarks" / "device.py"


def test_the_page_is_what_the_results_file_says() -> None:
    found = json.loads(results.RESULTS.read_text())
    template = results.TEMPLATE.read_text()
    page = results.PAGE.read_text()
    assert results.page_of(template, found) == page, "python -m benchmarks.results writes it again"
    named = set(re.findall(r"\{\{(\w+):", template))
    assert named == found["results"].keys()
    sources = "".join(path.read_text() for path in DEVICE.parent.glob("*.py") if path.name != "results.py")
    assert not [name for name in named if f"{name}=" not in sources and f'"{name}"' not in sources], "no benchmark writes it"
    found["results"]["trainer_over_bare"]["value"] = 0.514
    assert "| 0.51 |" in results.page_of(template, found)
    del found["results"]["trainer_over_bare"]
    with pytest.raises(KeyError):
        results.page_of(template, found)


def test_results_are_kept_by_name_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(results.VARIABLE, raising=False)
    results.keep(a=1.0)  # nowhere
    path = tmp_path / "results.json"
    monkeypatch.setenv(results.VARIABLE, str(path))
    results.keep(a=1.23456, b=2)
    results.keep(b=3)
    found = json.loads(path.read_text())
    assert {name: one["value"] for name, one in found["results"].items()} == {"a": 1.235, "b": 3.0}
    monkeypatch.setattr(results, "machine", lambda: "another")
    results.keep(c=4)
    assert json.loads(path.read_text()) == {"machine": "another", "results": {"c": found["results"]["a"] | {"value": 4.0}}}


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

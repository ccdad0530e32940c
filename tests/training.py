"""A short training, in this process or by the command line, which several tests look at."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlflow_icr.tracking import read_history

SHORT = [
    "--preset=digits", "--num-images=32", "--total-kimg=1.2", "--first-measurement-kimg=0.3", "--measurements=3",
    "--block-channels=8,16", "--num-samples=72", "--sample-steps=4", "--batch-size=32", "--probe-views=4",
]  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """What became of a training in this process."""

    returncode: int
    stdout: str
    stderr: str


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """A context in which a program may take signals, and Accelerate a state, as if the process were its own."""
    from accelerate.state import AcceleratorState, GradientState

    from trainers.launchers.job import STOP_SIGNALS

    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@contextmanager
def errors_of(count: int = 32) -> Iterator[None]:
    """A context in which measurements denoise few images: most of their time, where it is not what a test is about."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ERROR_IMAGES", "LEVEL_IMAGES"):
            patch.setattr(f"mlflow_icr.monitoring.errors.{name}", count)
        yield


def run_here(output_dir: Path, *flags: str) -> Ended:
    """The training in this process, which need not import everything again."""
    from trainers import train

    out, err = io.StringIO(), io.StringIO()
    with process_as_it_was(), redirect_stdout(out), redirect_stderr(err):
        status = train.main([*SHORT, f"--output-dir={output_dir}", *flags])
    return Ended(status, out.getvalue(), err.getvalue())


def run(output_dir: Path, *flags: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The training by its command, in a process of its own."""
    command = [sys.executable, "-m", "trainers.train", *SHORT, f"--output-dir={output_dir}", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload,no-any-return]


def measured(folder: Path) -> list[dict[str, float]]:
    """The history without what depends on the machine's speed."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in read_history(folder)]

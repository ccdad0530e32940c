"""A short training by the command line, which several tests look at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mlflow_icr.tracking import read_history

SHORT = [
    "--preset=digits", "--num-images=32", "--total-kimg=1.2", "--first-measurement-kimg=0.3", "--measurements=3",
    "--block-channels=16,32", "--num-samples=72", "--sample-steps=4", "--batch-size=32", "--probe-views=4",
]  # fmt: skip


def run(output_dir: Path, *flags: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainers.train", *SHORT, f"--output-dir={output_dir}", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload,no-any-return]


def measured(folder: Path) -> list[dict[str, float]]:
    """The history without what depends on the machine's speed."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in read_history(folder)]

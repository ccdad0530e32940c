"""The first error in a run's log."""

from __future__ import annotations

import re
from pathlib import Path

from mlflow_icr.tracking.mlflow.store import without_credentials

# A program's own `trainers.train: error: ...`, or the last line of a traceback; torch puts the rank before it.
ERROR = re.compile(r"^(?:\[rank\d+\]:\s*)?(?:[\w.]+: error: .+|(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b(?::.*)?)$")
LONGEST = 500  # characters of an error that are shown


def size(log: Path) -> int:
    """Bytes of a log; 0 where there is none."""
    return log.stat().st_size if log.exists() else 0


def first_error(log: Path, since: int = 0) -> str:
    """The first error in a log after `since` bytes, else its last line, without credentials; empty for an empty log."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(since)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    error = next((line for line in lines if ERROR.match(line)), lines[-1] if lines else "")
    return without_credentials(error)[:LONGEST]

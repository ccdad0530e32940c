"""The result of a run as one small file: what was planned, what was trained, and the rows of its history."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_icr.monitoring.series import Rows

DIGITS = 6  # significant, of every value: a measurement's own error is larger by far
UNUSED = ("perf/", "gen/density", "gen/coverage", "gen/precision", "gen/recall")


@dataclass(frozen=True)
class Result:
    """A run's name, factors, parameters as trackers show them, and measured rows."""

    name: str
    factors: Mapping[str, Any]
    params: Mapping[str, Any]
    rows: Rows


def result_path(folder: Path, name: str) -> Path:
    """The path of a run's result."""
    return folder / f"{name}.json.gz"


def _shortened(value: float) -> float:
    if value == 0 or not math.isfinite(value) or value == int(value):
        return value
    return float(f"{value:.{DIGITS}g}")


def write_result(folder: Path, result: Result) -> Path:
    """Write a result, whole or not at all; the same result is the same bytes."""
    rows = [{key: _shortened(value) for key, value in row.items() if not key.startswith(UNUSED)} for row in result.rows]
    content = {"name": result.name, "factors": result.factors, "params": result.params, "rows": rows}
    path = result_path(folder, result.name)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
    os.replace(part, path)
    return path


def read_results(folder: Path) -> list[Result]:
    """All results in a folder, by name."""
    return [Result(**json.loads(gzip.decompress(path.read_bytes()))) for path in sorted(folder.glob("*.json.gz"))]


def by_name(results: Sequence[Result]) -> dict[str, Result]:
    """Results by the names of their runs."""
    return {result.name: result for result in results}

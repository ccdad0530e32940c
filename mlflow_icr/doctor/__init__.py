"""Is this machine ready? Versions, devices, MLflow, encoders, plugins: one line each, with what to do if a check fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from mlflow_icr.doctor import machine, packages, tracking, weights
from mlflow_icr.doctor.check import BAD, OK, WARN, Check, carried_out

__all__ = ["BAD", "OK", "WARN", "Check", "doctor_command", "examine"]


def examine(given_weights: Mapping[str, Path] | None = None, folder: Path | None = None) -> Iterator[Check]:
    """Carry out every check in turn; `given_weights` are encoders' files by name, `folder` is where runs are written.

    Leaves nothing behind, except a deleted experiment on a tracking server until its `mlflow gc`. Raises nothing: a failure is
    a check with the state bad.
    """
    checks: dict[str, Callable[[], Iterable[Check]]] = {
        "python": packages.python,
        "mlflow-icr": packages.package,
        "packages": packages.required,
        "extras": packages.optional,
        "devices": machine.devices,
        "threads": machine.threads,
        "disk": partial(machine.disk, folder or Path()),
        "cache": machine.cache,
        "encoders": partial(weights.encoders, given_weights or {}),
        "plugins": tracking.plugins,
        tracking.STORE: tracking.tracking,
    }
    for name, check in checks.items():
        yield from carried_out(name, check)


def doctor_command(tracking_uri: str | None, weight_texts: Sequence[str], *, as_json: bool = False) -> int:
    """Print every check, as lines or as JSON; returns 1 when one is bad, else 0.

    Raises ValueError for weights that are not NAME=PATH.
    """
    given_weights = weights.parse_weights(weight_texts)
    if tracking_uri is not None:
        os.environ["MLFLOW_TRACKING_URI"] = tracking_uri  # set before MLflow is imported, also for its child processes
    results = []
    for check in examine(given_weights):
        results.append(check)
        if not as_json:
            print(check.line, flush=True)
    if as_json:
        print(json.dumps([asdict(check) for check in results], indent=2))
    return int(any(check.state == BAD for check in results))

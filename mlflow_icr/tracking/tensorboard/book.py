"""What a log shows in TensorBoard, operation by operation: new values, and earlier values that they replace.

A training that resumes from a checkpoint may log steps again that it had logged before it was killed. The earlier values of a
key from that step on are removed as soon as the key is logged again; equal values stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_icr.monitoring.series import read_history
from mlflow_icr.tracking.operations import LOGGED, MEASURED, File, Metrics, Operation, Params, Picture
from mlflow_icr.tracking.tensorboard.answer import answers
from mlflow_icr.tracking.tensorboard.custom_scalars import Overlay, overlay
from mlflow_icr.tracking.tensorboard.shown import Shown, scalar, shown

Last = dict[str, tuple[int, float]]  # the last step of a tag, and the value there


@dataclass
class Addition:
    """What one operation adds; each tag's values from its step in `cuts` on that were there before do not count.

    `late` is the earliest step that comes after a later one of its tag, `down` a tag of a training's own whose steps go down.
    """

    values: list[Shown] = field(default_factory=list)
    cuts: dict[str, int] = field(default_factory=dict)
    late: int | None = None
    down: str = ""


class Book:
    """The state after the operations so far, as plain data in `state`."""

    def __init__(self, folder: Path, state: Mapping[str, Any] | None = None) -> None:
        self.folder, state = folder, state or {}
        self._last: Last = {tag: (step, value) for tag, (step, value) in state.get("last", {}).items()}
        self._before: Last = {tag: (step, value) for tag, (step, value) in state.get("before", {}).items()}
        self._begun: set[str] = set(state.get("begun", ()))  # keys that were logged since a training went on
        self._overlay = Overlay(state.get("overlay"))
        self._described: bool = state.get("described", False)

    @property
    def state(self) -> dict[str, Any]:
        """Plain data from which the same book can be made."""
        return {
            "last": dict(self._last), "before": dict(self._before), "begun": sorted(self._begun),
            "overlay": dict(self._overlay.state), "described": self._described,
        }  # fmt: skip

    def add(self, operation: Operation) -> Addition:
        """Add the next operation. Raises ValueError for a step that event files do not have."""
        addition, step = Addition(), getattr(operation, "step", None) or 0
        if not -(2**63) <= step < 2**63:
            raise ValueError(f"step is {step}; expected one of 64 bits")
        match operation:
            case Params():
                if not self._described:  # those of a process that goes on would be one more run on the page
                    addition.values = list(shown(self.folder, operation))
                self._described = True
            case Metrics(source=source) if source == LOGGED:
                self._add_logged(operation, addition)
            case Metrics(step=step, time=time, values=values):
                addition.values = list(shown(self.folder, operation))
                if operation.source == MEASURED:
                    copies = self._overlay.add({"images_seen": step, **values})
                    copies = self._late_overlay(step) if copies is None else copies
                    more = answers(values) | copies
                    addition.values += [scalar(key, step, time / 1000, value) for key, value in more.items()]
                self._note(addition)
            case Picture() | File(role="distributions"):
                addition.values = list(shown(self.folder, operation))
                self._note(addition)
            case _:
                addition.values = list(shown(self.folder, operation))
        return addition

    def _add_logged(self, operation: Metrics, addition: Addition) -> None:
        if operation.resumes:
            self._before, self._begun = dict(self._last), set()
        for value in shown(self.folder, operation):
            number, tag, step = value.number, value.tag, value.step
            if number is not None:
                if tag not in self._begun:
                    self._begun.add(tag)
                    last, there = self._before.get(tag, (step - 1, math.nan))
                    if last == step and np.float32(there) == np.float32(number):
                        continue
                    if last >= step:
                        addition.cuts[tag] = step
                if step >= self._last.get(tag, (step, 0.0))[0]:
                    self._last[tag] = (step, number)
                elif tag not in addition.cuts:
                    addition.down = tag
            addition.values.append(value)

    def _note(self, addition: Addition) -> None:
        for value in addition.values:
            if self._last.get(value.tag, (value.step, 0.0))[0] > value.step:
                addition.late = value.step
            else:
                self._last[value.tag] = (value.step, math.nan if value.number is None else value.number)

    def _late_overlay(self, step: int) -> dict[str, float]:
        rows = read_history(self.folder)
        place = next((i for i, row in enumerate(rows) if row["images_seen"] == step), None)
        return {} if place is None else overlay(rows[: place + 1])


def all_shown(folder: Path, operations: Iterable[Operation], since: int) -> list[Shown]:
    """All values that operations show from a step on, in the order of their steps."""
    book, found = Book(folder), list[Shown]()
    for operation in operations:
        try:
            addition = book.add(operation)
        except Exception:  # it was set aside, with this as its reason
            continue
        if addition.cuts:
            found = [value for value in found if value.step < addition.cuts.get(value.tag, value.step + 1)]
        found += [value for value in addition.values if value.step >= since]
    return sorted(found, key=lambda value: value.step)

"""What a log shows in TensorBoard, operation by operation: new values, and earlier values that they replace.

A training that resumes from a checkpoint may log steps again that it had logged before it was killed. The earlier values of a
key from that step on are removed as soon as the key is logged again; equal values stay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_icr.monitoring.series import read_history
from mlflow_icr.tracking import operations as ops
from mlflow_icr.tracking.operations import DISTRIBUTIONS, FIGURE, LOGGED, MEASURED, SUMMARY, TABLE, File, Metrics, Picture
from mlflow_icr.tracking.tensorboard.answer import VERDICT, answers, summary_tag
from mlflow_icr.tracking.tensorboard.custom_scalars import Overlay, overlay
from mlflow_icr.tracking.tensorboard.hparams import session_start, text_value

TABLE_ROWS = 50
BUCKETS = 64  # of a histogram
Last = dict[str, tuple[int, float]]  # the last step of a tag, and the value there


@dataclass(frozen=True)
class Shown:
    """A value of a tag at a step, as TensorBoard's Summary.Value; `number` where it is a scalar."""

    tag: str
    step: int
    seconds: float
    value: Any
    number: float | None = None


@dataclass
class Addition:
    """The values of one operation; they replace each tag's earlier values from its step in `cuts` on.

    `late` is the earliest step that comes after a later one of its tag, `down` a logged tag whose steps go down.
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

    def add(self, operation: ops.Operation) -> Addition:
        """Add the next operation. Raises ValueError for a step that event files do not have."""
        addition, step = Addition(), getattr(operation, "step", None) or 0
        if not -(2**63) <= step < 2**63:
            raise ValueError(f"step is {step}; expected one of 64 bits")
        match operation:
            case ops.Params():
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
                    repeated = answers(values) | copies
                    addition.values += [scalar(key, step, time / 1000, value) for key, value in repeated.items()]
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
                    last, before = self._before.get(tag, (step - 1, math.nan))
                    if last == step and np.float32(before) == np.float32(number):
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


def all_shown(folder: Path, operations: Iterable[ops.Operation], since: int) -> list[Shown]:
    """All values that operations show from a step on, in the order of their steps."""
    book, values = Book(folder), list[Shown]()
    for operation in operations:
        try:
            addition = book.add(operation)
        except Exception:  # it was set aside, with this as its reason
            continue
        if addition.cuts:
            values = [value for value in values if value.step < addition.cuts.get(value.tag, value.step + 1)]
        values += [value for value in addition.values if value.step >= since]
    return sorted(values, key=lambda value: value.step)


def shown(folder: Path, operation: ops.Operation) -> Iterator[Shown]:
    """The values of an operation in event files, without values that depend on earlier operations."""
    match operation:
        case Metrics(values=values, step=step, time=time, texts=texts, source=source):
            for key, number in values.items():
                yield scalar(summary_tag(key) if source == SUMMARY else key, step, time / 1000, number)
            for key, text in texts.items():
                yield _text(key, step, time, text)
        case ops.Tags(values=values, step=step, time=time):
            yield from _texts(values, step, time)
        case ops.Params(values=values, time=time):
            for value in session_start(values, time / 1000).value:
                yield Shown(value.tag, 0, time / 1000, value)
        case Picture(key=key, step=step, time=time, path=path):
            yield from _image(folder / path, key, step, time)
        case File(role=role, path=path, name=name, step=step, time=time):
            if role == FIGURE:
                yield from _image(folder / path, f"figures/{name}", step, time)
            elif role == TABLE:
                yield _text(f"tables/{name}", step, time, _table(folder / path))
            elif role == DISTRIBUTIONS:
                yield from _histograms(folder / path, step, time)
        case ops.Dataset(description=description, context=context):
            lines = [f"**{key}**: {description[key]}" for key in ("name", "digest", "profile") if key in description]
            yield _text(f"data/{context}", 0, 0, "\n\n".join(lines))
        case ops.End(status=status, time=time):
            yield _text("status", 0, time, status)


def _texts(values: Mapping[str, str], step: int | None, time: int) -> Iterator[Shown]:
    """The verdict, and reasons for absent or uncertain values; tags of the run as one text."""
    if "verdict.text" in values:
        yield _text(VERDICT, step or 0, time, values["verdict.text"])
    elif step is None:
        lines = [f"**{key}**: {text}" for key, text in values.items() if not key.startswith("mlflow.")]
        if lines:
            yield _text("run", 0, time, "\n\n".join(lines))
    else:
        for key, text in values.items():
            kind, _, name = key.partition(".")
            yield _text(f"{kind}/{name}", step, time, text)


def scalar(key: str, step: int, seconds: float, number: float) -> Shown:
    """A scalar of the plain kind, float32, which every reader of event files knows."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    with np.errstate(over="ignore"):
        return Shown(key, step, seconds, Summary.Value(tag=key, simple_value=float(np.float32(number))), number)


def _text(tag: str, step: int, time: int, text: str) -> Shown:
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary()
    text_value(summary, f"{tag}/text_summary", text)
    return Shown(f"{tag}/text_summary", step, time / 1000, summary.value[0])


def _image(path: Path, key: str, step: int, time: int) -> Iterator[Shown]:
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    if not path.is_file():  # the file was removed; other operations do not depend on it
        return
    content = path.read_bytes()
    with Image.open(BytesIO(content)) as image:
        width, height, bands = *image.size, len(image.getbands())
    image = Summary.Image(height=height, width=width, colorspace=bands, encoded_image_string=content)
    yield Shown(key, step, time / 1000, Summary.Value(tag=key, image=image))


def _histograms(path: Path, step: int, time: int) -> Iterator[Shown]:
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

    if not path.is_file():
        return
    with np.load(path) as arrays:
        for key in arrays.files:
            numbers = np.asarray(arrays[key], dtype=np.float64).reshape(-1)
            numbers = numbers[np.isfinite(numbers)]
            if not len(numbers):
                continue
            counts, edges = np.histogram(numbers, BUCKETS)
            histogram = HistogramProto(
                min=numbers.min(), max=numbers.max(), num=len(numbers), sum=numbers.sum(), sum_squares=numbers @ numbers,
                bucket_limit=edges[1:].tolist(), bucket=counts.tolist(),
            )  # fmt: skip
            yield Shown(key, step, time / 1000, Summary.Value(tag=key, histo=histogram))


def _table(path: Path) -> str:
    """The first rows of a table, in Markdown."""
    content = json.loads(path.read_text())
    columns, rows = content["columns"], content["data"][:TABLE_ROWS]
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

"""Typed operations for trackers; each is one line of JSON in a folder's event log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Final

# Lanes do not wait for each other. A sink with one lane gets everything in order.
POINTS, FILES, MODELS, ALL = "points", "files", "models", "all"
# Where values come from: a measurement, which the journal has; a training's own log; the summary of a run.
MEASURED, LOGGED, SUMMARY = "measured", "logged", "summary"
# What a file is: kept as it is, a figure of the whole run, a table, distributions of a step, vectors for the projector.
ARTIFACT, FIGURE, TABLE, DISTRIBUTIONS, EMBEDDING = "artifact", "figure", "table", "distributions", "embedding"


@dataclass(frozen=True)
class Params:
    """The run's parameters, the first operation of a process. `time` is Unix milliseconds, here and in all others."""

    values: Mapping[str, Any]
    time: int = 0


@dataclass(frozen=True)
class Tags:
    """Texts by key, of which the last stays; `step` for those of a measurement."""

    values: Mapping[str, str]
    step: int | None = None
    time: int = 0


@dataclass(frozen=True)
class Metrics:
    """Values by key at a step; `texts` beside them and `resumes` (see `Logged`) are those of a training's own log."""

    step: int
    time: int
    values: Mapping[str, float]
    source: str = MEASURED
    texts: Mapping[str, str] = field(default_factory=dict)
    resumes: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture of a step: the PNG at `path` in the folder."""

    key: str
    step: int
    time: int
    path: str


@dataclass(frozen=True)
class File:
    """The file at `path` in the folder; `folder` is its place among artifacts, "" for the top, None for no artifact."""

    path: str
    folder: str | None = None
    role: str = ARTIFACT
    name: str = ""
    step: int = 0
    time: int = 0


@dataclass(frozen=True)
class Dataset:
    """A set of images: MLflow's name, digest, source, source_type, schema and profile; and what it is for."""

    description: Mapping[str, str]
    context: str


@dataclass(frozen=True)
class Model:
    """The checkpoint at `path`, with its measurement's values and time; `kept`: the run keeps it at its end.

    `turning` is the images seen of the checkpoint that the verdict keeps, once there was a turn.
    """

    step: int
    time: int
    path: str
    values: Mapping[str, float]
    kept: bool = False
    turning: int | None = None


@dataclass(frozen=True)
class End:
    """The run has ended: FINISHED, FAILED or KILLED."""

    status: str
    time: int = 0


Operation = Params | Tags | Metrics | Picture | File | Dataset | Model | End
KINDS: Final = {kind.__name__.lower(): kind for kind in (Params, Tags, Metrics, Picture, File, Dataset, Model, End)}


def now_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000


def lane_of(kind: str) -> str:
    """The lane of a kind of operation."""
    match kind:
        case "picture" | "file":
            return FILES
        case "model":
            return MODELS
        case _:
            return POINTS


def _number(value: float) -> float | str:
    """A number in strict JSON: infinities and NaN, such as a diverged loss, are texts."""
    return value if math.isfinite(value) else str(value)


def to_content(operation: Operation) -> dict[str, Any]:
    """An operation as plain data, without fields that have their defaults."""
    content: dict[str, Any] = {"kind": type(operation).__name__.lower()}
    for part in fields(operation):
        value = getattr(operation, part.name)
        default = part.default_factory() if part.default_factory is not MISSING else part.default
        if value is not default and value != default:
            content[part.name] = int(value) if part.name in ("step", "time") else value
    match operation:  # numbers and texts of other libraries are none in JSON
        case Metrics() | Model():
            content["values"] = {key: _number(as_number(key, value)) for key, value in operation.values.items()}
        case Tags():
            content["values"] = {key: str(value) for key, value in operation.values.items()}
    if "texts" in content:
        content["texts"] = {key: str(value) for key, value in content["texts"].items()}
    return content


def as_number(key: str, value: object) -> float:
    """A value as a float. Raises ValueError for one that is no number, or too large for one."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{key} is {value!r}; expected a number") from None


def to_line(operation: Operation) -> str:
    """An operation as one line."""
    return json.dumps(to_content(operation)) + "\n"


def from_content(content: Mapping[str, Any]) -> Operation:
    """The operation of plain data. Raises ValueError for other data."""
    try:
        kind = KINDS[content["kind"]]
        operation: Operation = kind(**{key: value for key, value in content.items() if key != "kind"})
        match operation:
            case Metrics() | Model():
                return replace(operation, values={key: float(value) for key, value in operation.values.items()})
        return operation
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an operation ({error!r})") from None


def from_line(line: bytes | str) -> Operation:
    """The operation of a line. Raises ValueError for another line."""
    return from_content(json.loads(line))


def described(operation: Operation) -> str:
    """An operation in a few words, for messages that it waits or is refused."""
    match operation:
        case Metrics(step=step, values=values):
            return f"metrics {_shown_keys(list(values))} at step {step}"
        case Params(values=values):
            return f"parameters {_shown_keys(list(values))}"
        case Tags(values=values):
            return f"tags {_shown_keys(list(values))}"
        case Picture(key=key, step=step):
            return f"picture {key!r} at step {step}"
        case File(path=path):
            return f"file {path!r}"
        case Dataset(context=context):
            return f"the {context} data set"
        case Model(step=step):
            return f"model at step {step}"
        case End(status=status):
            return f"the end, {status}"


def _shown_keys(keys: Sequence[str]) -> str:
    shown = ", ".join(map(repr, keys[:3]))
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown


def halves(operation: Operation) -> list[Operation]:
    """An operation of several values, split in two; any other unchanged."""
    match operation:
        case Metrics(values=values) if len(values) > 1:
            first, second = _halved(values)
            return [replace(operation, values=first), replace(operation, values=second, texts={}, resumes=False)]
        case Tags(values=values) if len(values) > 1:
            return [replace(operation, values=half) for half in _halved(values)]
        case Params(values=values) if len(values) > 1:
            return [replace(operation, values=half) for half in _halved(values)]
        case _:
            return [operation]


def _halved(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    items = list(values.items())
    return dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])

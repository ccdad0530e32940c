"""The grid of a sweep: several values for any field of a training's configuration, as text, and the runs that they make.

Values are separated by commas, and `0:5` is 0, 1, 2, 3, 4 (`64:257:64` is 64, 128, 192, 256). Where commas belong to a value,
as in block_channels or a path, values are separated by semicolons.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from mlflow_icr.arguments import refuse_unknown
from mlflow_icr.extraction.images import Size
from trainers.config import OPTIONS, PRESET, TrainConfig, load_config, preset_names
from trainers.groups import DataConfig
from trainers.options import Option
from trainers.places import PATHS, settled_paths

MOST_RUNS = 10_000
RANGE = re.compile(r"(-?\d+):(-?\d+)(?::(\d+))?")


@dataclass(frozen=True)
class GridPoint:
    """One run of a sweep: its name, its place in the grid (value by field, of all fields that were given), and all of it."""

    name: str
    place: Mapping[str, Any]
    config: TrainConfig


def values_of(field: str, text: str, shown: str = "") -> list[Any]:
    """The values of a field that a text names, in its order. Raises ValueError for none, a repeated, or an impossible one."""
    shown = shown or field
    entry = PRESET if field == PRESET.name else OPTIONS[field]
    separator = ";" if entry.is_tuple or field in PATHS else ","
    parts = [part.strip() for part in text.split(separator)]
    may_be_empty = len(parts) == 1 and (entry.hint is str or entry.is_tuple)  # as in stop_on= and companions=
    values: list[Any] = []
    for part in parts:
        if not part and not may_be_empty:
            raise ValueError(
                f"{shown} is {text!r}, where a value is empty; expected one value, or several between {separator!r}"
            )
        values += _range(part, text, shown) if entry.hint is int and ":" in part else [_value(entry, part, shown)]
        if len(values) > MOST_RUNS:
            raise ValueError(f"{shown} is {text!r}, which is over {MOST_RUNS} values; expected fewer")
    repeated, _ = Counter(values).most_common(1)[0]
    if len(set(values)) < len(values):
        raise ValueError(f"{shown} is {text!r}, which names {text_of(repeated)} twice; expected each value once")
    return values


def _range(part: str, text: str, shown: str) -> list[int]:
    match = RANGE.fullmatch(part)
    first, end, step = (int(number) if number else 1 for number in match.groups()) if match else (0, 0, 0)
    if step < 1 or not first < end:
        raise ValueError(f"{shown} is {text!r}; expected ranges like 0:5, which is 0, 1, 2, 3, 4, or 64:257:64")
    if len(range(first, end, step)) > MOST_RUNS:
        raise ValueError(f"{shown} is {text!r}, which is over {MOST_RUNS} values; expected fewer")
    return list(range(first, end, step))


def _value(entry: Option, part: str, shown: str) -> Any:
    try:
        return entry.typed(part)
    except ValueError as error:
        raise ValueError(f"{shown}{str(error).removeprefix(entry.name)}") from None


def expand(preset: str, texts: Mapping[str, str], shown: Mapping[str, str] | None = None) -> list[GridPoint]:
    """All runs of a grid, the last field's values changing fastest. Raises ValueError for impossible values, naming them.

    `shown` has the names by which fields were given, if those differ.
    """
    shown = shown or {}
    axes = {"preset": values_of("preset", preset)}
    for name in axes["preset"]:
        refuse_unknown("preset", name, preset_names())
    axes |= {field: values_of(field, text, shown.get(field, "")) for field, text in texts.items()}
    count = math.prod(len(values) for values in axes.values())
    if count > MOST_RUNS:
        raise ValueError(f"the grid has {count} runs; expected at most {MOST_RUNS}")
    varied = [field for field, values in axes.items() if len(values) > 1]
    runs = []
    for values in product(*axes.values()):
        place = settled_paths(dict(zip(axes, values, strict=True)))
        config = load_config(place["preset"], {field: value for field, value in place.items() if field != "preset"})
        runs.append(GridPoint(_name(config, varied), place, config))
    names = [run.name for run in runs]
    if len(set(names)) < len(names):  # two paths that differ in characters that a name does not show
        runs = [GridPoint(f"{index:04d}-{run.name}", run.place, run.config) for index, run in enumerate(runs)]
    return runs


def varied_fields(runs: Sequence[GridPoint]) -> list[str]:
    """The fields in which the runs differ, in the order of the grid."""
    return [field for field in runs[0].place if any(run.place[field] != runs[0].place[field] for run in runs)]


def text_of(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(text_of, value))
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _name(config: TrainConfig, varied: Sequence[str]) -> str:
    """The name of a run, its folder and its log: its size, its seed, and whatever else differs between runs."""
    return "-".join(_parts(config, varied))


def _parts(config: TrainConfig, varied: Sequence[str]) -> Iterator[str]:
    if "preset" in varied:
        yield config.preset
    yield f"n{config.data.num_images}"
    yield f"seed{config.run.seed}"
    for field in varied:
        if field not in ("preset", "num_images", "seed"):
            yield re.sub(r"[^A-Za-z0-9.+_]", "x", f"{field}_{text_of(config.get(field))}")


def check_data(runs: Sequence[GridPoint]) -> None:
    """Raise ValueError where a set has fewer images than a run takes, and for unknown sets; each is loaded once."""
    from trainers.data import load_source

    largest: dict[tuple[str, Size, str], DataConfig] = {}
    for run in runs:
        c = run.config.data
        key = (c.source, c.size, c.split)
        if key not in largest or c.num_images + c.num_heldout > largest[key].num_images + largest[key].num_heldout:
            largest[key] = c
    for (data, resolution, split), c in largest.items():
        available = len(load_source(data, resolution, split))
        if c.num_images + c.num_heldout > available:
            raise ValueError(
                f"num_images is {c.num_images} and num_heldout {c.num_heldout}; expected at most {available} together, "
                f"the size of {data!r}"
            )


def grid_fields() -> list[str]:
    """The fields that a grid may give values to, besides the preset."""
    return list(OPTIONS)

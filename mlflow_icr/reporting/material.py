"""The material of a report: one run's history, parameters, tags and pictures, from a folder or from MLflow."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mlflow_icr.monitoring.evidence import ratio_key
from mlflow_icr.monitoring.series import series
from mlflow_icr.monitoring.summary import summarise
from mlflow_icr.monitoring.verdict import Verdict, verdict

# The prefixes of measurements' keys; a training's own values may have any other name, at steps of its own.
MEASURED = re.compile(r"(repr[^/]*|gen|mem|loss|perf)/")
# A step without one of these is not a measurement, even if a training logs its loss there.
TELLING = re.compile(r"(repr[^/]*|gen|mem)/")
# The trainers' parameters, where their names differ from the protocol's.
PROTOCOL_NAMES = {"num_images": "probe_images", "num_views": "probe_views"}
PROTOCOL_FIELDS = (
    "layer", "sigmas", "augmentation_level", "num_images", "num_views", "seed", "ridge", "normalisation", "projection",
    "shrinkage",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class RunMaterial:
    """One run: `rows` of finite numbers by images seen, and its data; pictures and arrays are read when they are needed.

    `pictures` are readers of image files by key and images seen, `figures` those of the whole run by name, `eigenvalues`
    readers of (D,) by images seen, `probe` readers of numbers by probe image, (N,) by key, `thumbnails` one of training images,
    (N, H, W, 3) uint8. `left_out` counts values that were not finite numbers. `place` is its folder or run id.
    """

    name: str
    place: str
    rows: tuple[Mapping[str, float], ...]
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[str, Mapping[int, Callable[[], bytes]]] = field(default_factory=dict)
    figures: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    eigenvalues: Mapping[int, Callable[[], np.ndarray]] = field(default_factory=dict)
    status: str = ""
    left_out: int = 0
    probe: Mapping[int, Callable[[], Mapping[str, np.ndarray]]] = field(default_factory=dict)
    thumbnails: Callable[[], np.ndarray] | None = None

    @cached_property
    def verdict(self) -> Verdict:
        """The verdict on the history."""
        return verdict(self.rows)

    @cached_property
    def summary(self) -> Mapping[str, float]:
        """The numbers that a run table is sorted by."""
        return summarise(self.rows)

    @property
    def measured(self) -> bool:
        """Whether there is an ICR in the history."""
        return any(key in row for row in self.rows for key in ("repr/icr", "repr/icr_debiased"))

    @property
    def icr_key(self) -> str:
        """The debiased ICR, or the plug-in value where there is no debiased one."""
        return "repr/icr_debiased" if self.of("repr/icr_debiased") else "repr/icr"

    @property
    def ratio_key(self) -> str:
        """The error ratio that the verdict reads."""
        return ratio_key(self.rows)

    def of(self, key: str) -> list[tuple[int, float]]:
        """A key's (images seen, value), in order."""
        return series(self.rows, key)

    def last(self, key: str) -> tuple[int, float] | None:
        """The newest (images seen, value) of a key."""
        points = self.of(key)
        return points[-1] if points else None

    def lowest(self, key: str) -> tuple[int, float] | None:
        """The lowest (images seen, value) of a key after the start, the first of equals."""
        points = [point for point in self.of(key) if point[0] > 0]
        return min(points, key=lambda point: (point[1], point[0]), default=None)

    def bounds(self, key: str, step: int) -> tuple[float, float] | None:
        """The interval of a key's value at a measurement, where it has one."""
        # ICR's interval is that of the debiased value, and has the shorter name.
        stem = key.removesuffix("_debiased")
        row = self.by_step.get(step, {})
        if key.endswith("/icr") or not {f"{stem}_low", f"{stem}_high"} <= row.keys():
            return None
        return row[f"{stem}_low"], row[f"{stem}_high"]

    @cached_property
    def by_step(self) -> Mapping[int, Mapping[str, float]]:
        """The rows by images seen."""
        return {int(row["images_seen"]): row for row in self.rows}

    @cached_property
    def keys(self) -> list[str]:
        """Every key of the history, in order of name."""
        return sorted({key for row in self.rows for key in row} - {"images_seen"})

    def noted(self, kind: str) -> Mapping[str, str]:
        """Texts by key that were recorded while measuring: `absent` reasons, or `warning`s."""
        return {key.removeprefix(f"{kind}."): text for key, text in self.tags.items() if key.startswith(f"{kind}.")}

    @property
    def protocol(self) -> Mapping[str, str]:
        """The recorded fields of the protocol; `digest` if it was recorded."""
        recorded = dict(self.params)
        if "logged.protocol" in self.tags:  # of a training that logs to a tracker of its own
            recorded |= _json_texts(self.tags["logged.protocol"])
        protocol = {}
        plain = "protocol.layer" not in recorded
        for name in PROTOCOL_FIELDS if "layer" in recorded or not plain else ():
            key = PROTOCOL_NAMES.get(name, name) if plain else f"protocol.{name}"
            if key in recorded and (plain, name) != (True, "seed"):  # a trainer's seed is that of its training
                protocol[name] = recorded[key]
        digest = recorded.get("protocol_digest") or self.tags.get("icr.protocol_digest", "")
        return protocol | ({"digest": digest} if digest else {})

    @property
    def encoder(self) -> str:
        """The name of the encoder that samples were judged in, by the keys of the history; empty where none were."""
        for key in self.keys:
            match = re.fullmatch(r"gen/(?:kid|fd)(?:_train|_gap)?_(?P<name>.+?)(?:_std)?", key)
            if match:
                return match["name"]
        return ""


def _json_texts(text: str) -> dict[str, str]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # A database keeps infinity as the largest number that it has.
    return math.isfinite(value) and abs(value) < sys.float_info.max


def finite_rows(rows: Iterable[Mapping[str, float]]) -> tuple[tuple[Mapping[str, float], ...], int]:
    """Rows with finite numbers only, one for each number of images seen, in order; and how many values were left out."""
    by_step: dict[int, dict[str, float]] = {}
    left_out = 0
    for row in rows:
        step = int(row["images_seen"])
        kept = {key: float(value) for key, value in row.items() if key != "images_seen" and _is_number(value)}
        left_out += len(row) - 1 - len(kept)
        by_step.setdefault(step, {"images_seen": step}).update(kept)
    return tuple(by_step[step] for step in sorted(by_step)), left_out

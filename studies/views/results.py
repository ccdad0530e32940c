"""The results of the study of error views: a line of a CSV file for each set of images and denoiser, and their table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

ALLOWED = 0.05  # by how much a ratio may differ from 1
SIGMA = 0.29  # the monitored noise level


@dataclass(frozen=True)
class Line:
    """Ratios of views' errors over images', near and far, at multiples of the monitored noise level, and the AUC at it.

    `chosen` says which views the monitor's `view_*` values are of.
    """

    images: str
    denoiser: str
    near_half: float
    near: float
    near_double: float
    near_fourfold: float
    far_half: float
    far: float
    far_double: float
    far_fourfold: float
    auc: float
    auc_low: float
    auc_high: float
    chosen: str


def read_lines(path: Path) -> list[Line]:
    """The lines of a file; none where there is no file."""
    if not path.exists():
        return []
    hints = get_type_hints(Line)
    with path.open() as file:
        return [Line(**{key: hints[key](value) for key, value in row.items()}) for row in csv.DictReader(file)]


def write_lines(path: Path, lines: Sequence[Line]) -> None:
    """Write a file, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Line)], lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in asdict(line).items()})
    part.rename(path)


def farthest(lines: Sequence[Line], kind: str) -> float:
    """How far the ratios of near or far views are from 1, at most, at the monitored level. Raises ValueError for no lines."""
    return max(abs(getattr(line, kind) - 1) for line in lines)


def table_of(lines: Sequence[Line]) -> str:
    """The table, in Markdown, with a sentence that sums it up."""
    if not lines:
        return "Not measured yet: `python -m studies.views`."
    levels = [f"near, sigma {factor * SIGMA:.3g}" for factor in (0.5, 1, 2, 4)]
    head = ["images", "denoiser", *levels, f"far, sigma {SIGMA}", f"AUC, sigma {SIGMA}", "chosen"]
    rows = [
        [
            x.images, x.denoiser, f"{x.near_half:.3f}", f"{x.near:.3f}", f"{x.near_double:.3f}", f"{x.near_fourfold:.3f}",
            f"{x.far:.2f}", f"{x.auc:.2f} ({x.auc_low:.2f} to {x.auc_high:.2f})", x.chosen,
        ]
        for x in sorted(lines, key=lambda line: [other.images for other in lines].index(line.images))
    ]  # fmt: skip
    text = "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
    near, far = farthest(lines, "near"), farthest(lines, "far")
    held = "all within" if near <= ALLOWED else "not all within"
    summary = (
        f"Ratios of near views are {held} {ALLOWED} of 1 at sigma {SIGMA}, at most {near:.3f} off; those of far ones {far:.2f}."
    )
    return f"{text}\n\n{summary}"

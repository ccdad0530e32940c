"""The results of a sweep: one row a run, as a table, and a figure of turns and first copies against training images."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_icr import summarise, verdict
from mlflow_icr.extraction.files import write_whole
from mlflow_icr.monitoring.plots import COLOURS
from mlflow_icr.monitoring.series import HISTORY, read_history
from trainers.experiments.sweep.grid import GridPoint, text_of, varied_fields

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
MEASURED = (
    "images_seen", "verdict", "turned_at_images_seen", "turned_at_images_seen_low", "turned_at_images_seen_high", "icr_min",
    "icr_min_images_seen", "mem_onset_images_seen", "lead_images", "checkpoint_images_seen",
)  # fmt: skip
SHOWN = {
    "num_images": "training images",
    "seed": "seed",
    "status": "status",
    "verdict": "verdict",
    "turned_at_images_seen": "turned at",
    "mem_onset_images_seen": "copies begin at",
    "icr_min": "lowest ICR",
    "lead_images": "lead of the lowest ICR",
}


def result_row(run: GridPoint, varied: Sequence[str], folder: Path, status: str, why: str = "") -> Row:
    """A run's row: its place in the grid, its status, what was measured (None where it was not), and its first error."""
    row: Row = {"run": run.name, "num_images": run.config.data.num_images, "seed": run.config.run.seed}
    row |= {field: text_of(run.place[field]) for field in varied if field not in row}
    row |= {"status": status.lower()} | dict.fromkeys(MEASURED)
    try:
        rows = read_history(folder) if (folder / HISTORY).exists() else []
    except ValueError as error:  # damaged: of this run there is nothing to show
        rows, why = [], why or str(error)
    if rows:
        run_verdict = verdict(rows)
        measured = {
            "images_seen": rows[-1]["images_seen"],
            "verdict": run_verdict.state,
            **summarise(rows),
            **run_verdict.summary(),
        }
        row |= {key: measured.get(key) for key in MEASURED}
    return row | {"total_images": run.config.total_images, "error": why}


def write_table(rows: Sequence[Row], study: Path) -> list[Path]:
    """`sweep.csv` and `sweep.json` in the study's folder; both have every run."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    sheet, content = study / "sweep.csv", study / "sweep.json"
    write_whole(sheet, lambda file: file.write(text.getvalue().encode()))
    write_whole(content, lambda file: file.write((json.dumps(rows, indent=1) + "\n").encode()))
    return [sheet, content]


def _cell(key: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:.3f}" if key == "icr_min" else f"{value:,.0f}"


def table_text(rows: Sequence[Row], varied: Sequence[str]) -> str:
    """The table as aligned Markdown, which reads well in a terminal too."""
    others = {field: field for field in varied if field not in SHOWN}
    names = {"num_images": SHOWN["num_images"], "seed": SHOWN["seed"], **others, **SHOWN}
    lines = [list(names.values())] + [[_cell(key, row[key]) for key in names] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    text = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *text[1:]])


def _groups(rows: Sequence[Row], varied: Sequence[str]) -> dict[str, list[Row]]:
    """Rows that differ in size and seed alone, by what else they have in common."""
    others = [field for field in varied if field not in ("num_images", "seed")]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(", ".join(f"{field} {row[field]}" for field in others), []).append(row)
    return groups


def _medians(axes: Axes, rows: Sequence[Row], key: str, colour: str, style: str, label: str) -> None:
    by_size: dict[int, list[float]] = {}
    for row in rows:
        if row[key]:
            by_size.setdefault(row["num_images"], []).append(row[key])
    points = sorted((size, statistics.median(values)) for size, values in by_size.items())
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=1.2, label=label)


def _draw(axes: Axes, rows: Sequence[Row], colour: str, name: str) -> None:
    prefix = f"{name}: " if name else ""
    for row in rows:
        at, size = row["turned_at_images_seen"], row["num_images"]
        if at:
            bounds = [[max(0.0, at - row["turned_at_images_seen_low"])], [max(0.0, row["turned_at_images_seen_high"] - at)]]
            axes.errorbar([size], [at], yerr=bounds, color=colour, marker="o", markersize=4, elinewidth=0.8, alpha=0.7)
        elif row["images_seen"]:  # no turn so far: it comes later, if at all
            axes.plot([size], [row["images_seen"]], color=colour, marker="^", fillstyle="none", linestyle="none", alpha=0.7)
        if row["mem_onset_images_seen"]:
            axes.plot([size], [row["mem_onset_images_seen"]], color=colour, marker="x", linestyle="none", alpha=0.7)
    _medians(axes, rows, "turned_at_images_seen", colour, "-", f"{prefix}turned (median, each with its bounds)")
    _medians(axes, rows, "mem_onset_images_seen", colour, ":", f"{prefix}copies begin (median)")


def sweep_figure(rows: Sequence[Row], varied: Sequence[str], title: str) -> Figure:
    """Images seen at the turn, with its bounds, and where copies begin, of every run, against training images.

    Lines join the medians over seeds. A triangle is a run that has not turned by what it has seen.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, group) in enumerate(_groups(rows, varied).items()):
        _draw(axes, group, COLOURS[index % len(COLOURS)], name)
    if any(row["images_seen"] and not row["turned_at_images_seen"] for row in rows):
        axes.plot([], [], color="0.4", marker="^", fillstyle="none", linestyle="none", label="no turn so far")
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = sorted({row["num_images"] for row in rows})
    if len(sizes) <= 12:  # more would be printed over each other
        axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("training images")
    axes.set_ylabel("images seen")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9)
    return figure


def write_figure(rows: Sequence[Row], varied: Sequence[str], title: str, study: Path) -> Path:
    """`sweep.png` in the study's folder."""
    path = study / "sweep.png"
    figure = sweep_figure(rows, varied, title)
    write_whole(path, lambda file: figure.savefig(file, dpi=130, format="png"))
    return path


def write_results(runs: Sequence[GridPoint], rows: Mapping[str, Row], study: Path, title: str) -> list[Path]:
    """Table and figure of all runs, in the order of the grid; returns the files."""
    varied = varied_fields(runs)
    ordered = [rows[run.name] for run in runs]
    return [*write_table(ordered, study), write_figure(ordered, varied, title, study)]

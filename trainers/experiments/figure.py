"""The picture of a study: contamination, copies and residual energy of its runs over images seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mlflow_icr import summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, float]]

PANELS = (
    ("repr/icr", "ICR\n(low is clean)"),
    ("mem/ratio_l2", "share of samples\nthat are copies"),
    ("repr/fisher_residual_energy", "residual energy along\nFisher directions"),
)
COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce")  # told apart in grey and by the colour-blind, in this order


def _draw(axes: Axes, rows: Rows, key: str, **style: object) -> None:
    # An untrained network is off every scale, and 0 images off a logarithmic axis.
    points = [(row["images_seen"] / 1000, row[key]) for row in rows if key in row and row["images_seen"] > 0]
    if points:
        axes.plot(*zip(*points, strict=True), **style)  # type: ignore[arg-type]


def study_figure(histories: Mapping[str, Rows], title: str) -> Figure:
    """ICR, `mem/ratio_l2` and Fisher residual energy of each run, one panel below the other, over images seen.

    Dotted lines mark a run's lowest ICR and the onset of copies, where it has one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8.5), layout="constrained")
    panels = figure.subplots(len(PANELS), 1, sharex=True)
    for (name, rows), colour in zip(histories.items(), COLOURS, strict=False):
        for axes, (key, label) in zip(panels, PANELS, strict=True):
            _draw(axes, rows, key, color=colour, marker="o", markersize=3.5, label=name)
            axes.set_ylabel(label)
        found = summarise(rows)
        if "mem_onset_images_seen" not in found or "icr_min_images_seen" not in found:
            continue
        for key, text, axes in (
            ("icr_min_images_seen", "lowest ICR", panels[0]),
            ("mem_onset_images_seen", "copies begin", panels[1]),
        ):
            at = found[key] / 1000
            for every in panels:
                every.axvline(at, color=colour, linestyle=":", linewidth=1)
            axes.annotate(
                f" {text}\n {at:.0f} kimg", (at, 1), xycoords=("data", "axes fraction"), va="top", color=colour, fontsize=9
            )
    panels[0].set_title(title)
    panels[0].legend(frameon=False, loc="lower left")
    panels[1].set_ylim(-0.02, 1.02)
    panels[2].set_yscale("log")
    panels[-1].set_xscale("log")
    panels[-1].set_xlabel("images seen (thousands)")
    panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    return figure

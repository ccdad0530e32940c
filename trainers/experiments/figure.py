"""The picture of a study: contamination, verdict, copies and residual energy of its runs over images seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mlflow_icr import summarise, verdict
from mlflow_icr.monitoring.evidence import NAMES, RATIOS, ratio_key
from mlflow_icr.monitoring.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, float]]

LABELS = {
    "repr/icr_debiased": "ICR, debiased\n(low is clean)",
    **NAMES,
    "mem/ratio_l2": "share of samples\nthat are copies",
    "repr/fisher_residual_energy": "residual energy along\nFisher directions",
}
BANDS = {
    "repr/icr_debiased": ("repr/icr_low", "repr/icr_high"),
    **{key: (f"{key}_low", f"{key}_high") for key in RATIOS},
}
LOGARITHMIC = (*RATIOS, "repr/fisher_residual_energy")


def _draw(axes: Axes, rows: Rows, key: str, colour: str, name: str) -> None:
    # An untrained network is off every scale, and 0 images off a logarithmic axis.
    points = [(row["images_seen"] / 1000, row[key]) for row in rows if key in row and row["images_seen"] > 0]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, label=name)
    low, high = BANDS.get(key, ("", ""))
    band = [(row["images_seen"] / 1000, row[low], row[high]) for row in rows if low in row and row["images_seen"] > 0]
    if band:
        at, below, above = zip(*band, strict=True)
        axes.fill_between(at, below, above, color=colour, alpha=0.15, linewidth=0)


def _mark(panels: Sequence[Axes], at: float, text: str, colour: str, panel: int, style: str) -> None:
    for axes in panels:
        axes.axvline(at, color=colour, linestyle=style, linewidth=1)
    panels[panel].annotate(
        f" {text}\n {at:.0f} kimg", (at, 1), xycoords=("data", "axes fraction"), va="top", color=colour, fontsize=9
    )


def study_figure(histories: Mapping[str, Rows], title: str) -> Figure:
    """ICR (debiased), the error ratio that the verdict reads, copies and Fisher residual energy of each run over images seen.

    A dashed line and a band mark where a run's verdict dates its turn, a dotted line where copies begin.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 10.5), layout="constrained")
    ratio = ratio_key(row for rows in histories.values() for row in rows)
    keys = ("repr/icr_debiased", ratio, "mem/ratio_l2", "repr/fisher_residual_energy")
    panels = figure.subplots(len(keys), 1, sharex=True)
    for (name, rows), colour in zip(histories.items(), COLOURS, strict=False):
        run_verdict = verdict(rows)
        for axes, key in zip(panels, keys, strict=True):
            _draw(axes, rows, key, colour, f"{name}: {run_verdict.state}")
            axes.set_ylabel(LABELS[key])
        if run_verdict.turned_at is not None and run_verdict.low is not None and run_verdict.high is not None:
            _mark(panels, run_verdict.turned_at / 1000, "turn", colour, 1, "--")
            for axes in panels:
                axes.axvspan(max(run_verdict.low, 1) / 1000, run_verdict.high / 1000, color=colour, alpha=0.08, linewidth=0)
        onset = summarise(rows).get("mem_onset_images_seen")
        if onset is not None:
            _mark(panels, onset / 1000, "copies begin", colour, 2, ":")
    panels[0].set_title(title)
    panels[0].legend(frameon=False, loc="lower left")
    panels[2].set_ylim(-0.02, 1.02)
    for axes, key in zip(panels, keys, strict=True):
        if key in LOGARITHMIC:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    panels[-1].set_xscale("log")
    panels[-1].set_xlabel("images seen (thousands)")
    panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure

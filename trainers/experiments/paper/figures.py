"""Figures 2 to 14 as functions of results, in the paper's axes, with intervals where there are some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlflow_icr.monitoring.plots import COLOURS
from trainers.experiments.paper.beyond import LATENTS, OUTLIERS, REPEATS
from trainers.experiments.paper.claims import Results
from trainers.experiments.paper.plan import DUPLICATES, EDM_FEW, EDM_MANY, FLOW_FEW, FLOW_MANY, LATENT_FEW

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

KIMG = "thousand images seen"
Rows = Sequence[Mapping[str, Any]]


def _axes(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * count, 3.4), layout="constrained")
    return figure, [figure.add_subplot(1, count, place + 1) for place in range(count)]


def _runs(results: Results, *roles: str, key: str = "trajectory") -> list[tuple[str, Rows]]:
    return [(name, r[key]) for name, r in sorted(results.items()) if r["role"] in roles and r.get(key)]


def _line(axes: Axes, rows: Rows, x: str, y: str, label: str, place: int, bounds: tuple[str, str] | None = None) -> None:
    """A curve with its interval, of the rows that have it."""
    colour, unit = COLOURS[place % len(COLOURS)], 1000 if x == "images_seen" else 1
    drawn = [row for row in rows if row.get(y) is not None and row[x] > 0]
    axes.plot([row[x] / unit for row in drawn], [row[y] for row in drawn], marker="o", ms=3, color=colour, label=label)
    if bounds is not None:
        bounded = [row for row in drawn if row.get(bounds[0]) is not None]
        low, high = ([row[bound] for row in bounded] for bound in bounds)
        axes.fill_between([row[x] / unit for row in bounded], low, high, color=colour, alpha=0.2, lw=0)


def logarithmic(axis: Axis) -> None:
    """Put ticks at 1, 2 and 5, as plain numbers: matplotlib's own overlap within two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _finish(figure: Figure, panels: Sequence[Axes], x: str, ys: Sequence[str]) -> Figure:
    for axes, y in zip(panels, ys, strict=True):
        axes.set(xlabel=x, ylabel=y, xscale="log")
        logarithmic(axes.xaxis)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7)
    return figure


ICR_BOUNDS, COPY_BOUNDS = ("icr_low", "icr_high"), ("copies_low", "copies_high")


def _over_training(results: Results, roles: Sequence[str], panels: Sequence[tuple[str, str, tuple[str, str] | None]]) -> Figure:
    """Panels of one value each over training, a curve for each run of the roles."""
    figure, axes = _axes(len(panels))
    for panel, (key, _, bounds) in zip(axes, panels, strict=True):
        for place, (name, rows) in enumerate(_runs(results, *roles)):
            _line(panel, rows, "images_seen", key, name, place, bounds)
    return _finish(figure, axes, KIMG, [label for _, label, _ in panels])


def _over_noise(results: Results, roles: Sequence[str], panels: Sequence[tuple[str, str, tuple[str, str] | None]]) -> Figure:
    figure, axes = _axes(len(panels))
    for panel, (key, _, bounds) in zip(axes, panels, strict=True):
        for place, (name, rows) in enumerate(_runs(results, *roles, key="window")):
            _line(panel, rows, "sigma", key, name, place, bounds)
    return _finish(figure, axes, "sigma", [label for _, label, _ in panels])


WINDOW = (("icr_debiased", "ICR", ICR_BOUNDS), ("accuracy", "linear probe accuracy", None))
TURN = (("icr_debiased", "ICR", ICR_BOUNDS), ("copies", "memorization ratio", COPY_BOUNDS))
TRACES = (("trace_invariant", "tr(Sigma_s)", None), ("trace_residual", "tr(Sigma_xi)", None))


def subset_figure(results: Results) -> Figure:
    """Figure 12: plug-in and debiased ICR over the number of images."""
    figure, axes = _axes(1)
    for name, rows in _runs(results, EDM_MANY, key="subsets"):
        _line(axes[0], rows, "images", "icr", f"{name}, plug-in", 0)
        _line(axes[0], rows, "images", "icr_debiased", f"{name}, debiased", 1, ICR_BOUNDS)
    return _finish(figure, axes, "images", ["ICR"])


def _kinds_figure(results: Results, key: str) -> Figure:
    figure, axes = _axes(1)
    for _, rows in _runs(results, EDM_FEW, key=key):
        for place, what in enumerate(dict.fromkeys(row["what"] for row in rows)):
            _line(axes[0], [r for r in rows if r["what"] == what], "images_seen", "icr_debiased", what, place, ICR_BOUNDS)
    return _finish(figure, axes, KIMG, ["ICR"])


def origins_figure(results: Results, role: str) -> Figure:
    """Each image's distance to the others, and when its own error ratio turned; those that did not turn are above the line."""
    figure, axes = _axes(1)
    for place, (name, rows) in enumerate(_runs(results, role, key="origins")):
        last = max((row["turned"] for row in rows if row["turned"] is not None), default=1.0)
        for repeated in (False, True):
            chosen = [row for row in rows if (row["times"] > 1) == repeated]
            if not chosen:
                continue
            at = [(row["turned"] or 1.5 * last) / 1000 for row in chosen]
            label = name + (f", {chosen[0]['times']} times each" if repeated else "")
            colour = COLOURS[(place + repeated) % len(COLOURS)]
            axes[0].scatter([row["to_others"] for row in chosen], at, s=10, color=colour, label=label)
        if any(row["turned"] is None for row in rows):
            axes[0].axhline(1.25 * last / 1000, color="grey", lw=0.5, ls=":")
    axes[0].set(xlabel="mean distance to the five nearest, 1 is by chance", ylabel=f"own ratio turned, {KIMG}", yscale="log")
    logarithmic(axes[0].yaxis)
    if axes[0].get_legend_handles_labels()[1]:
        axes[0].legend(fontsize=7)
    return figure


CLASSES = (
    ("icr_debiased", "ICR", ICR_BOUNDS),
    ("silhouette", "silhouette", None),
    ("class_separation", "class separation", None),
)
FIGURES: dict[int, Callable[[Results], Figure]] = {
    2: lambda results: _over_noise(results, (EDM_MANY, FLOW_MANY), WINDOW),
    3: lambda results: _over_training(results, (EDM_MANY,), (WINDOW[0], ("frechet_pixels", "Frechet distance, pixels", None))),
    4: lambda results: _over_training(results, (EDM_FEW,), TURN),
    5: lambda results: _over_training(results, (FLOW_FEW,), TURN),
    6: lambda results: _over_training(results, (EDM_FEW,), (("neighbour_agreement", "neighbours of the same class", None),)),
    7: lambda results: _over_training(results, (EDM_FEW, EDM_MANY), TRACES),
    8: lambda results: _over_noise(results, (EDM_MANY,), TRACES),
    9: lambda results: _over_noise(results, (EDM_FEW,), WINDOW),
    10: lambda results: _over_training(
        results, (EDM_MANY,), (("alignment", "Alignment", None), ("frechet_pixels", "Frechet distance, pixels", None))
    ),
    11: lambda results: _over_training(results, (EDM_FEW,), CLASSES),
    12: subset_figure,
    13: lambda results: _kinds_figure(results, "levels"),
    14: lambda results: _kinds_figure(results, "layers"),
}

DECODED = ("copies_decoded", "copies of decoded images", ("copies_decoded_low", "copies_decoded_high"))
BEYOND: dict[str, Callable[[Results], Figure]] = {
    LATENTS: lambda results: _over_training(results, (LATENT_FEW,), (*TURN, DECODED)),
    OUTLIERS: lambda results: origins_figure(results, EDM_FEW),
    REPEATS: lambda results: origins_figure(results, DUPLICATES),
}

"""Figures of measurements. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mlflow_icr.monitoring.sweep import NoiseSweep

COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce")  # distinct in grey and for the colour-blind, in this order


def pixels_of(figure: Figure) -> np.ndarray:
    """A figure as a picture, (H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _curve(axes: Axes, sweep: NoiseSweep, layer: str, title: str) -> None:
    """ICR with its interval over sigma, and the probe's accuracy on an axis of its own."""
    points = [p for p in sweep.of(layer) if p.icr is not None]
    sigmas = [p.sigma for p in points]
    value, low, high = np.array([(p.icr, p.low, p.high) for p in points], dtype=float).reshape(-1, 3).T
    axes.fill_between(sigmas, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.plot(sigmas, value, color=COLOURS[0], marker="o", markersize=4)
    star = sweep.sigma_star(layer)
    if star is not None:
        axes.axvline(star, color=COLOURS[0], linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("sigma")
    axes.set_ylabel("ICR, debiased, with 95 % interval", color=COLOURS[0])
    axes.set_title(f"{title}\n{layer}", fontsize=10)
    labelled = {p.sigma: p.accuracy for p in sweep.of(layer) if p.accuracy is not None}
    if labelled:
        right = axes.twinx()
        right.plot(list(labelled), list(labelled.values()), color=COLOURS[1], marker="s", markersize=4)
        right.set_ylabel("linear probe accuracy", color=COLOURS[1])


def _map(axes: Axes, sweep: NoiseSweep) -> None:
    """ICR of every layer and sigma."""
    layers, sigmas = sweep.layers, sweep.sigmas
    values = np.full((len(layers), len(sigmas)), np.nan)
    for p in sweep.points:
        if p.icr is not None:
            values[layers.index(p.layer), sigmas.index(p.sigma)] = p.icr
    image = axes.imshow(values, aspect="auto", cmap="viridis_r")
    axes.set_xticks(range(len(sigmas)), [f"{s:g}" for s in sigmas], rotation=45)
    axes.set_yticks(range(len(layers)), layers)
    middle = np.nanmean(values)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if value > middle else "k")
    axes.set_xlabel("sigma")
    axes.figure.colorbar(image, ax=axes, label="ICR, debiased")


def sweep_figure(sweeps: Mapping[str, NoiseSweep], layer: str | None = None) -> Figure:
    """For each named sweep, ICR and accuracy over sigma at a layer (its best one unless given), above its sigma x layer map."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * len(sweeps), 7), layout="constrained")
    panels = figure.subplots(2, len(sweeps), squeeze=False)
    for column, (name, sweep) in enumerate(sweeps.items()):
        _curve(panels[0, column], sweep, layer or sweep.best_layer or sweep.layers[0], name)
        _map(panels[1, column], sweep)
    return figure

"""Pictures of samples: their distances to training images, and quality against copies over a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mlflow_icr.monitoring.plots import COLOURS, pixels_of

BINS = 40
QUALITIES = (("gen/kid_", "kernel distance"), ("gen/fd_", "Frechet distance"))


def distance_histogram(generated: np.ndarray, train: np.ndarray, encoder: str) -> np.ndarray:
    """Distances of generated images (N,) to their nearest training image, against those of training images (M,) to another.

    A picture (H, W, 3) uint8. The axis ends at the largest of both kinds of distances, so copies are at the left edge whatever
    the scale of the embedding.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, max(float(generated.max()), float(train.max()), 1e-12), BINS + 1)
    for numbers, colour, name in ((train, "0.6", "training to another training image"), (generated, COLOURS[0], "generated")):
        axes.hist(numbers, edges.tolist(), weights=np.full(len(numbers), 1 / len(numbers)), color=colour, alpha=0.6, label=name)
    axes.set_xlabel(f"distance to the nearest training image ({encoder.replace('_', ' ')})")
    axes.set_ylabel("share of images")
    axes.legend(fontsize=8)
    return pixels_of(figure)


def _points(rows: Sequence[Mapping[str, float]], quality: str, copies: str) -> np.ndarray:
    """(images seen, copies, quality) of the rows that have both, (R, 3); without step 0, before training."""
    points = [(r["images_seen"], r[copies], r[quality]) for r in rows if {copies, quality} <= r.keys() and r["images_seen"] > 0]
    return np.array(sorted(points), dtype=float).reshape(-1, 3)


def trade_off(rows: Sequence[Mapping[str, float]], encoder: str) -> np.ndarray | None:
    """Kernel and Frechet distance against the share of copies, over a training: a picture (H, W, 3) uint8.

    Each point is a measurement, from light to dark with images seen. Distances are those to held-out images where there are
    any, else to training images, and the axis says so. None where fewer than two measurements have both.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    copies = next((key for key in (f"mem/ratio_{encoder}", "mem/ratio_l2") if any(key in row for row in rows)), "")
    panels = []
    for prefix, name in QUALITIES:
        for key, real in ((f"{prefix}{encoder}", "held-out"), (f"{prefix}train_{encoder}", "training")):
            points = _points(rows, key, copies)
            if len(points) > 1:
                panels.append((f"{name} to {real} images\n({encoder.replace('_', ' ')}; lower is better)", points))
                break
    if not panels:
        return None
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        images_seen, share, quality = points.T
        axes.plot(share, quality, color="0.7", linewidth=1, zorder=1)
        kimg = images_seen / 1000
        drawn = axes.scatter(share, quality, c=kimg, cmap="viridis_r", norm=LogNorm(kimg.min(), kimg.max()), zorder=2)
        axes.set_xlabel("share of samples that are copies (lower is better)")
        axes.set_ylabel(name)
        if (quality > 0).all() and quality.max() > 20 * quality.min():
            axes.set_yscale("log")
        figure.colorbar(drawn, ax=axes, label="kimg")
    return pixels_of(figure)

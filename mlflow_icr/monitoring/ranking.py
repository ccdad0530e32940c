"""Rank training images and classes by their share of the residual energy and by their influence on ICR."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_icr.monitoring.series import read_arrays, read_history

SHARE, INFLUENCE, LABEL = "residual_share", "influence", "label"


def rank_images(arrays: Mapping[str, np.ndarray], section: str = "repr") -> list[dict[str, Any]]:
    """One row for each probe image, the largest share of the residual energy first.

    `image` is its place in the training set, `residual_share` sums to 1 over images, `relative_share` is 1 on average,
    `influence` is how much the image raises the ICR (ICR units, times N), `label` its class. Columns that a measurement does
    not have are left out. Raises ValueError when there is no residual share.
    """
    if f"{section}/{SHARE}" not in arrays:
        raise ValueError(f"the measurement has no {section}/{SHARE}; it has {', '.join(arrays) or 'nothing'}")
    share = arrays[f"{section}/{SHARE}"].astype(np.float64)
    columns = {
        "image": np.arange(len(share)),
        "residual_share": share,
        "relative_share": share * len(share),
        "influence": arrays.get(f"{section}/{INFLUENCE}"),
        "label": arrays.get(LABEL),
    }
    order = np.argsort(-share, kind="stable")
    return [
        {"rank": place + 1} | {name: column[i].item() for name, column in columns.items() if column is not None}
        for place, i in enumerate(order)
    ]


def rank_classes(arrays: Mapping[str, np.ndarray], section: str = "repr") -> list[dict[str, Any]]:
    """One row for each class, the largest mean share of the residual energy of an image first; empty without labels."""
    if LABEL not in arrays:
        return []
    rows = rank_images(arrays, section)
    classes = []
    for label in sorted({row["label"] for row in rows}):
        of_label = [row for row in rows if row["label"] == label]
        entry = {
            "label": label,
            "images": len(of_label),
            "relative_share": float(np.mean([row["relative_share"] for row in of_label])),
        }
        if "influence" in of_label[0]:
            entry["influence"] = float(np.mean([row["influence"] for row in of_label]))
        classes.append(entry)
    return sorted(classes, key=lambda entry: -entry["relative_share"])


def ranked_step(folder: Path | str, step: int | None = None) -> int:
    """The measurement of an output folder to rank by: the given one, or the newest. Raises ValueError for none."""
    steps = [int(row["images_seen"]) for row in read_history(folder)]
    if not steps or (step is not None and step not in steps):
        raise ValueError(f"step is {step}; expected one of {', '.join(map(str, steps)) or 'none: nothing was measured'}")
    return steps[-1] if step is None else step


def rank_folder(folder: Path | str, step: int | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Images and classes of a run's output folder, ranked at a step (images seen), the newest unless given."""
    arrays = read_arrays(folder, ranked_step(folder, step))
    return rank_images(arrays), rank_classes(arrays)

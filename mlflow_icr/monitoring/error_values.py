"""What denoising errors come to: ratios, AUCs and excesses of views and of held-out images, as values of a report."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mlflow_icr.monitoring.errors import Errors
from mlflow_icr.monitoring.section import Found
from mlflow_icr.representation import Estimate, heldout_error_ratio, view_auc, view_error_ratio, view_excess

ENDS = ("", "_low", "_high")
VIEWS = {"view": "near", "far": "far"}  # what a key begins with, by the views that it is of
WHY_ABSENT = "training makes such views itself: training_augmentations is {}"


def _enter(found: Found, key: str, end: str, estimate: Callable[[], Estimate]) -> None:
    """Enter an estimate with its interval, `end` coming after the key, or the reason for its absence."""
    try:
        e = estimate()
    except ValueError as error:
        found.absent[f"{key}{end}"] = str(error)
        return
    found.values |= {f"{key}{part}{end}": value for part, value in zip(ENDS, (e.value, e.low, e.high), strict=True)}


def _log_ratios(image: Tensor, view: Tensor) -> Tensor:
    """log of each view's error over its image's, (N,); an error of 0 counts as the smallest number."""
    return (view.clamp(min=1e-30) / image.clamp(min=1e-30)).log()


def read_errors(name: str, errors: Errors, level: float, trained: tuple[str, ...], found: Found) -> None:
    """Enter what the errors of a network say, under its prefix; `level` is the noise as a multiple of the monitored one."""
    end = "" if level == 1 else f"_x{level:g}"
    image = errors.image
    for kind, which in VIEWS.items():
        view, way = (errors.near, errors.near_way) if which == "near" else (errors.far, errors.far_way)
        if view is None or way is None:
            keys = [f"{name}/{kind}_{what}{end}" for what in ("error_ratio", "auc", "excess")]
            found.absent |= dict.fromkeys(keys, WHY_ABSENT.format(", ".join(trained)))
            continue
        _enter(found, f"{name}/{kind}_error_ratio", end, lambda view=view: view_error_ratio(image, view))  # type: ignore[misc]
        _enter(found, f"{name}/{kind}_auc", end, lambda view=view: view_auc(image, view))  # type: ignore[misc]
        _enter(found, f"{name}/{kind}_excess", end, lambda view=view, way=way: view_excess(image, view, way))  # type: ignore[misc]
        if f"{name}/{kind}_error_ratio{end}" in found.values:
            found.arrays[f"{name}/{kind}_log_ratio{end}"] = _log_ratios(image, view).float().numpy()
    if f"{name}/view_error_ratio{end}" in found.values or f"{name}/far_error_ratio{end}" in found.values:
        found.values[f"{name}/image_error{end}"] = float(image.mean())
    if errors.heldout is not None:
        heldout = errors.heldout
        _enter(found, f"{name}/heldout_error_ratio", end, lambda: heldout_error_ratio(image, heldout))

"""Values of a report from denoising errors: ratios, AUCs and excesses of views and of held-out images."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mlflow_icr.monitoring.errors import Errors
from mlflow_icr.monitoring.section import SectionResult
from mlflow_icr.representation import Estimate, heldout_error_ratio, view_auc, view_error_ratio, view_excess

ENDS = ("", "_low", "_high")
WHY_ABSENT = "training makes such views itself: training_augmentations is {}"


def _enter(result: SectionResult, key: str, end: str, estimate: Callable[[], Estimate]) -> None:
    """Enter an estimate with its interval under the key with the suffix `end`, or the reason for its absence."""
    try:
        e = estimate()
    except ValueError as error:
        result.absent[f"{key}{end}"] = str(error)
        return
    result.values |= {f"{key}{part}{end}": value for part, value in zip(ENDS, (e.value, e.low, e.high), strict=True)}


def _log_ratios(image: Tensor, view: Tensor) -> Tensor:
    """log of each view's error over its image's, (N,); an error of 0 counts as the smallest number."""
    return (view.clamp(min=1e-30) / image.clamp(min=1e-30)).log()


def read_errors(name: str, errors: Errors, level: float, chosen: str, trained: tuple[str, ...], result: SectionResult) -> None:
    """Enter the values that follow from a network's errors, under its prefix; `level` is the noise over the monitored noise.

    `chosen` names the views that `view_*` are computed from: near or far.
    """
    end = "" if level == 1 else f"_x{level:g}"
    image, why = errors.image, WHY_ABSENT.format(", ".join(trained))
    for kind, view in (("near", errors.near), ("far", errors.far)):
        if view is None:
            result.absent[f"{name}/{kind}_error_ratio{end}"] = why
        else:
            _enter(result, f"{name}/{kind}_error_ratio", end, lambda view=view: view_error_ratio(image, view))  # type: ignore[misc]
    view, way = (errors.near, errors.near_way) if chosen == "near" else (errors.far, errors.far_way)
    if view is None or way is None:
        result.absent |= {f"{name}/view_{what}{end}": why for what in ("error_ratio", "auc", "excess")}
    else:
        _enter(result, f"{name}/view_error_ratio", end, lambda: view_error_ratio(image, view))
        _enter(result, f"{name}/view_auc", end, lambda: view_auc(errors.other, errors.single[chosen]))
        _enter(result, f"{name}/view_excess", end, lambda: view_excess(image, view, way))
        if f"{name}/view_error_ratio{end}" in result.values:
            result.arrays[f"{name}/view_log_ratio{end}"] = _log_ratios(image, view).float().numpy()
    if bool(image.isfinite().all()):
        result.values[f"{name}/image_error{end}"] = float(image.mean())
    if errors.heldout is not None:
        heldout, pairs = errors.heldout, min(len(errors.heldout), len(image))
        _enter(result, f"{name}/heldout_error_ratio", end, lambda: heldout_error_ratio(image, heldout))
        _enter(result, f"{name}/heldout_auc", end, lambda: view_auc(errors.single["image"][:pairs], heldout[:pairs]))

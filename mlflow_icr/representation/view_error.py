"""Denoising errors of training images against those of their views or of other images, with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlflow_icr.representation.quantile import student_t


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


def _checked(image_errors: Tensor, view_errors: Tensor) -> tuple[Tensor, Tensor]:
    if image_errors.shape != view_errors.shape or image_errors.ndim != 1 or len(image_errors) < 2:
        raise ValueError(
            f"errors have shapes {tuple(image_errors.shape)} and {tuple(view_errors.shape)}; expected (N,) twice, N >= 2"
        )
    return _finite(image_errors), _finite(view_errors)


def _finite(errors: Tensor) -> Tensor:
    errors = errors.cpu().double()
    if not bool(torch.isfinite(errors).all() and (errors >= 0).all()):
        raise ValueError("errors are negative or not finite; expected finite numbers >= 0")
    if not float(errors.mean()) > 0:
        raise ValueError("errors are all 0; a ratio needs some")
    return errors


def _of_logarithm(ratio: float, error: float, degrees: int, level: float) -> Estimate:
    reach = torch.tensor(error * student_t(level, degrees)).exp().item()
    return Estimate(ratio, ratio / reach, ratio * reach)


def view_error_ratio(image_errors: Tensor, view_errors: Tensor, level: float = 0.95) -> Estimate:
    """The ratio of mean errors, from the errors (N,) of N images and of their views, at one noise level.

    A network that generalizes denoises a slightly moved training image about as well as the image; one that has memorized its
    images does not: the ratio grows without bound, as the gap between training and held-out loss does, but needs no held-out
    images. The interval is that of the logarithm, from the images' influences on it, with Student's t. Raises ValueError for
    other shapes, N < 2, or errors that are not positive and finite.
    """
    a, b = _checked(image_errors, view_errors)
    error = (b / b.mean() - a / a.mean()).std() / len(a) ** 0.5  # of log ratio
    return _of_logarithm(float(b.mean() / a.mean()), float(error), len(a) - 1, level)


def heldout_error_ratio(train_errors: Tensor, heldout_errors: Tensor, level: float = 0.95) -> Estimate:
    """The ratio of mean errors, of held-out images (M,) over training images (N,), with the interval of its logarithm.

    1 means that both are denoised equally well. Raises ValueError for fewer than 2 of either, or errors not positive and
    finite.
    """
    if train_errors.ndim != 1 or heldout_errors.ndim != 1 or min(len(train_errors), len(heldout_errors)) < 2:
        raise ValueError(
            f"errors have shapes {tuple(train_errors.shape)} and {tuple(heldout_errors.shape)}; expected (N,) and (M,), >= 2"
        )
    a, b = _finite(train_errors), _finite(heldout_errors)
    square = sum(float((x / x.mean()).var()) / len(x) for x in (a, b))
    return _of_logarithm(float(b.mean() / a.mean()), square**0.5, min(len(a), len(b)) - 1, level)


def view_auc(image_errors: Tensor, view_errors: Tensor, level: float = 0.95) -> Estimate:
    """P(error of a view > error of its image), from errors (N,) with independent noise; 0.5 is chance, 1 is memorized.

    As in tests of membership, single errors are compared: on the same noise a difference too small to matter would decide.
    Held-out images in place of views are compared with as many training images.
    The interval is exact (Clopper & Pearson 1934); equal errors count half in the value, and on either side in the interval.
    Raises ValueError as `view_error_ratio` does.
    """
    from scipy.stats import binomtest

    a, b = _checked(image_errors, view_errors)
    n, above, ties = len(a), int((b > a).sum()), int((b == a).sum())
    low = binomtest(above, n).proportion_ci(level, method="exact").low
    high = binomtest(above + ties, n).proportion_ci(level, method="exact").high
    return Estimate((above + ties / 2) / n, float(low), float(high))


def view_excess(image_errors: Tensor, view_errors: Tensor, squared_ways: Tensor, level: float = 0.95) -> Estimate:
    """Excess error of views over images, as a share of the squared distance between the two; errors and distances are (N,).

    A network that denoises a view as well as its image has 0. One that gives the image for both has the whole squared distance
    as excess error: 1. `squared_ways` are these distances, mean squares over the same pixels as the errors. Raises ValueError
    for other shapes, N < 2, errors not finite, or distances that are all 0.
    """
    a, b = _checked(image_errors, view_errors)
    if squared_ways.shape != a.shape:
        raise ValueError(f"squared_ways have shape {tuple(squared_ways.shape)}; expected ({len(a)},), as the errors")
    squared = _finite(squared_ways)
    value = float((b - a).mean() / squared.mean())
    reach = float(((b - a) - value * squared).std() / squared.mean()) / len(a) ** 0.5 * student_t(level, len(a) - 1)
    return Estimate(value, value - reach, value + reach)

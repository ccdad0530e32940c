"""How much better a network knows its training images than views of them: a ratio of denoising errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlflow_icr.representation.quantile import student_t


@dataclass(frozen=True)
class ViewErrorRatio:
    """Mean squared denoising error on augmented images over that on the images themselves, with a confidence interval."""

    value: float
    low: float
    high: float


def view_error_ratio(image_errors: Tensor, view_errors: Tensor, level: float = 0.95) -> ViewErrorRatio:
    """The ratio of mean errors, from the errors (N,) of N images and of their views, at one noise level.

    A network that has learned what images look like denoises a slightly cropped and recoloured training image about as well
    as the image; one that has learned its images by heart does not: the ratio grows without bound, as the gap between
    training and held-out loss does, but without images held out. The interval is that of the logarithm, by the images'
    influences on it, with Student's t. Raises ValueError for other shapes, N < 2, or errors that are not positive and finite.
    """
    if image_errors.shape != view_errors.shape or image_errors.ndim != 1 or len(image_errors) < 2:
        raise ValueError(
            f"errors have shapes {tuple(image_errors.shape)} and {tuple(view_errors.shape)}; expected (N,) twice, N >= 2"
        )
    a, b = image_errors.double(), view_errors.double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all() and (a >= 0).all() and (b >= 0).all()):
        raise ValueError("errors are negative or not finite; expected finite numbers >= 0")
    if not (float(a.mean()) > 0 and float(b.mean()) > 0):
        raise ValueError("errors are all 0; a ratio needs some")
    ratio = b.mean() / a.mean()
    error = (b / b.mean() - a / a.mean()).std() / len(a) ** 0.5  # of log ratio
    reach = (error * student_t(level, len(a) - 1)).exp()
    return ViewErrorRatio(float(ratio), float(ratio / reach), float(ratio * reach))

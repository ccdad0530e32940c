"""Where copies come from: when each training image's own error ratio turned, its copies, and how typical it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import norm, rankdata, spearmanr
from torch import Tensor

from mlflow_icr import Denoiser
from mlflow_icr.extraction.denoisers import device_of, encoder_of, evaluating
from mlflow_icr.extraction.error_views import far_views
from mlflow_icr.extraction.keyed import keyed_generator
from mlflow_icr.extraction.views import as_unit_interval
from mlflow_icr.generation.duplicates import chance_distance, near_duplicates
from mlflow_icr.generation.neighbours import k_nearest

DRAWS = 8  # noises of each image: its ratio has a standard error of some per cent
TURNED = 1.5  # ratio of errors from which an image is known by heart
NEAR = 5  # neighbours whose mean distance says how far an image lies from the others
Z95 = 1.96


@torch.no_grad()
def own_errors(denoiser: Denoiser, images: Tensor, sigma: float, draws: int = DRAWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Mean squared errors (N,) of denoising each of images (N, C, H, W), and of far views of it on the same noises."""
    device, encode = device_of(denoiser), encoder_of(denoiser)
    clean = as_unit_interval(images) * 2 - 1
    errors = torch.zeros(2, len(images), dtype=torch.float64)
    with evaluating(denoiser.network):
        for draw in range(draws):
            views = far_views(clean, torch.arange(len(images)) + draw)
            generator = keyed_generator("own-error", seed, draw)
            noise: Tensor | None = None
            for row, pixels in enumerate((clean, views)):
                x = pixels.to(device) if encode is None else encode(pixels.to(device))
                if noise is None:
                    noise = torch.from_numpy(generator.standard_normal(tuple(x.shape), dtype=np.float32)).to(device)
                error = torch.cat(
                    [(denoiser(a + sigma * b, sigma) - a) for a, b in zip(x.split(256), noise.split(256), strict=True)]
                )
                errors[row] += error.square().flatten(1).mean(1).cpu().double() / draws
    return errors[0], errors[1]


def turning(steps: Sequence[int], ratios: Sequence[float]) -> float | None:
    """Images seen from which a ratio stays above 1.5, between two measurements by the logarithm; None where it does not."""
    above = [ratio > TURNED for ratio in ratios]
    if not above or not above[-1]:
        return None
    first = len(above) - above[::-1].index(False) if False in above else 0
    if first == 0 or steps[first - 1] <= 0:
        return float(steps[first])
    below, above_it = ratios[first - 1], ratios[first]
    share = (TURNED - below) / (above_it - below)
    return float(steps[first - 1] * (steps[first] / steps[first - 1]) ** share)


def distances_to_others(images: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest others (N, 5) of each of images (N, C, H, W), and their mean distance (N,) in units of that by chance."""
    flat = as_unit_interval(images).flatten(1)
    near = k_nearest(flat, flat, min(NEAR, len(flat) - 1), exclude_self=True)
    return near.indices, near.distances.mean(1) / chance_distance(flat)


def image_rows(
    images: Tensor, times: Sequence[int], errors: Sequence[Mapping[str, Any]], copies: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each image: its `copies` among the last samples, when it was first copied, its own ratio, and its distances.

    `times` says how often each is in the training set; `errors` and `copies` are rows of measurements, in their order. `curve`
    has images seen and the own ratio at each.
    """
    nearest, far = distances_to_others(images)
    steps = [row["images_seen"] for row in errors]
    rows = []
    for i in range(len(images)):
        ratios = [row["view_error"][i] / row["image_error"][i] for row in errors]
        counts = [sum(n == i and c for n, c in zip(row["nearest"], row["copied"], strict=True)) for row in copies]
        copied_at = [row["images_seen"] for row, count in zip(copies, counts, strict=True) if count]
        rows.append(
            {
                "image": i,
                "times": times[i],
                "turned": turning(steps, ratios),
                "ratio": ratios[-1],
                "curve": list(zip(steps, ratios, strict=True)),
                "copies": counts[-1] if counts else 0,
                "first_copied": copied_at[0] if copied_at else None,
                "to_others": float(far[i]),
                "nearest": nearest[i].tolist(),
            }
        )
    return rows


def likeliest(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The images with most copies, then with the largest own ratio."""
    return sorted(rows, key=lambda row: (-row["copies"], -row["ratio"]))[:count]


def repeated_groups(images: Tensor) -> list[list[int]]:
    """Images (N, C, H, W) that are nearly the same by their pixels, as `mlflow-icr duplicates` finds them, in groups."""
    return near_duplicates(as_unit_interval(images).flatten(1)).groups(len(images))


def earliness(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """How early each image's own ratio turned, larger is earlier; the same for all that did not."""
    return np.array([-math.inf if row["turned"] is None else -row["turned"] for row in rows])


def rank_correlation(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float] | None:
    """Spearman's correlation of a and b (N,) with a 95 % interval; None where one of them is constant.

    By Fisher's transformation with the standard error of Bonett & Wright (2000).
    """
    a, b = rankdata(a), rankdata(b)
    if len(a) < 5 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    r = float(spearmanr(a, b).statistic)
    if abs(r) > 1 - 1e-12:
        return r, r, r
    reach = Z95 * math.sqrt((1 + r * r / 2) / (len(a) - 3))
    return r, math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach)


def auc(above: np.ndarray, below: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """P(a value of `above` (M,) is larger than one of `below` (N,)), ties count half, with its interval.

    Newcombe (2006), method 5: the variance of Hanley & McNeil at the bound itself, so that it has a width at 0 and 1 too.
    """
    ranks = rankdata(np.concatenate([above, below]))
    m, n = len(above), len(below)
    value = float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))
    z, star = float(norm.ppf((1 + level) / 2)), (m + n) / 2 - 1

    def outside(bound: float) -> float:
        spread = bound * (1 - bound) * (1 + star * ((1 - bound) / (2 - bound) + bound / (1 + bound))) / (m * n)
        return (bound - value) ** 2 - z * z * spread

    edge = 1e-12  # the bounds 0 and 1 themselves have no spread, and are roots too
    low = 0.0 if value == 0 else brentq(outside, 0.0, min(value, 1 - edge))
    high = 1.0 if value == 1 else brentq(outside, max(value, edge), 1.0)
    return value, float(low), float(high)

"""Where copies come from: own errors in closed form, when a ratio turns, and which images come first, against scipy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from trainers.experiments.paper import beyond, origins
from trainers.experiments.paper.claims import AGREES, DISAGREES, UNDECIDED
from trainers.experiments.paper.plan import (
    DUPLICATES,
    EDM_FEW,
)


class Nothing:
    """A denoiser that gives 0 for everything, so that an error is the image's mean square."""

    network = torch.nn.Identity()

    def __call__(self, x: torch.Tensor, sigma: object) -> torch.Tensor:
        return torch.zeros_like(x)


def test_own_errors_have_a_closed_form() -> None:
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (6, 1, 16, 16), dtype=np.uint8))
    image, view = origins.own_errors(Nothing(), images, 0.3, draws=8)  # type: ignore[arg-type]
    x = images.numpy()[:, 0] / 127.5 - 1
    np.testing.assert_allclose(image, np.square(x).mean((1, 2)), rtol=1e-5)
    edges = [x[:, -1:, :], x[:, :, -1:], x[:, :1, :], x[:, :, :1]]  # a shift by a pixel loses one edge and repeats the other
    moved = [
        np.square(x).sum((1, 2)) + sign * (np.square(edges[2]).sum((1, 2)) - np.square(edges[0]).sum((1, 2)))
        for sign in (1, -1)
    ]
    moved += [
        np.square(x).sum((1, 2)) + sign * (np.square(edges[3]).sum((1, 2)) - np.square(edges[1]).sum((1, 2)))
        for sign in (1, -1)
    ]
    np.testing.assert_allclose(view, np.mean(moved, 0) / 256, rtol=1e-5)


def test_a_ratio_turns_where_it_stays_above() -> None:
    steps = [0, 1000, 2000, 4000]
    assert origins.turning(steps, [1, 1, 1, 1.4]) is None
    assert origins.turning(steps, [1, 1.6, 1.2, 2.0]) == pytest.approx(2000 * 2 ** (0.3 / 0.8))
    assert origins.turning(steps, [1, 2, 2, 2]) == 1000
    assert origins.turning(steps, [2, 2, 2, 2]) == 0


def test_tests_of_which_images_come_first_are_those_of_scipy_and_hold_their_level() -> None:
    rng = np.random.default_rng(5)
    covered = {"auc": 0, "spearman": 0}
    for _ in range(400):
        a, b = rng.normal(1.0, size=8), rng.normal(size=56)
        value, low, high = origins.auc(a, b)
        assert value == pytest.approx(scipy.stats.mannwhitneyu(a, b).statistic / (8 * 56))
        covered["auc"] += low <= scipy.stats.norm.cdf(1 / 2**0.5) <= high
        x, y = rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], 64).T
        found = origins.rank_correlation(x, y)
        assert found is not None
        assert found[0] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
        covered["spearman"] += found[1] <= 6 / np.pi * np.arcsin(0.25) <= found[2]
    # 95 % of 400, and three standard errors of that.
    assert all(count >= 400 * 0.95 - 3 * 4.4 for count in covered.values()), covered
    value, low, high = origins.auc(np.ones(8), np.zeros(56))
    assert (value, high) == (1, 1)
    assert 0.8 < low < 1


def test_outliers_and_repeated_images_are_judged_by_intervals() -> None:
    def rows(order: Sequence[float], repeated: int = 0) -> list[dict[str, Any]]:
        return [
            {"image": i, "turned": 100.0 + t, "to_others": float(i), "times": 10 if i < repeated else 1, "copies": 1}
            for i, t in enumerate(order)
        ]  # fmt: skip

    mixed = np.random.default_rng(0).permutation(64).tolist()
    for order, outcome in ((range(64, 0, -1), AGREES), (range(64), DISAGREES), (mixed, UNDECIDED)):
        results = {f"r{seed}": {"role": EDM_FEW, "origins": rows(list(order))} for seed in range(3)}
        assert beyond.outliers_claim(results).outcome == outcome
    for order, outcome in ((range(64), AGREES), (range(64, 0, -1), DISAGREES), (mixed, UNDECIDED)):
        results = {"r": {"role": DUPLICATES, "origins": rows(list(order), repeated=8)}}
        assert beyond.repeats_claim(results).outcome == outcome

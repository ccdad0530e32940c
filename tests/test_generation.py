"""Distances and copies against scipy, closed forms and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import cdist

from mlflow_icr import frechet_distance, memorization_ratio


def scipys(x: np.ndarray, y: np.ndarray) -> float:
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cx @ cy).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx + cy - 2 * root))


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 16), (400, 90, 40), (60, 500, 3)])
def test_frechet_distance_is_scipys(rng: np.random.Generator, n: int, m: int, d: int) -> None:
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 3
    y = rng.standard_normal((m, d)) @ rng.standard_normal((d, d))
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(scipys(x, y), rel=1e-6)


def test_frechet_distance_of_diagonal_gaussians(rng: np.random.Generator) -> None:
    """With equal rows up to scale and shift, the closed form is sum (mu_x - mu_y)^2 + (s_x - s_y)^2."""
    z = torch.from_numpy(rng.standard_normal((500, 6)))
    z = torch.linalg.qr(z - z.mean(0)).Q * 499**0.5  # exactly uncorrelated, unit variance
    a, b, shift = torch.arange(1.0, 7).double(), 2.0, torch.linspace(-1, 1, 6, dtype=torch.float64)
    expected = float(shift.square().sum() + (a - b).square().sum())
    assert frechet_distance(z * a + shift, z * b) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_with_fewer_rows_than_dimensions(rng: np.random.Generator) -> None:
    """Rank-deficient covariances: the value in the rows' own span, where it is regular, is the value."""
    low = rng.standard_normal((30, 5)), rng.standard_normal((40, 5)) * 2 + 1
    q, _ = np.linalg.qr(rng.standard_normal((200, 5)))
    x, y = (torch.from_numpy(part @ q.T) for part in low)
    assert frechet_distance(x, y) == pytest.approx(scipys(*low), rel=1e-9)


def test_frechet_distance_is_symmetric_and_zero_on_itself(rng: np.random.Generator) -> None:
    x, y = (torch.from_numpy(rng.standard_normal((50, 80)).astype(np.float32)) for _ in range(2))
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-12)
    assert 0 <= frechet_distance(x, x) < 1e-10
    assert frechet_distance(torch.ones(4, 3), torch.ones(4, 3)) == 0


def test_copies_are_counted(rng: np.random.Generator) -> None:
    train = rng.standard_normal((300, 20))
    copies = train[:25] + 1e-3 * rng.standard_normal((25, 20))
    new = rng.standard_normal((75, 20))
    result = memorization_ratio(torch.from_numpy(np.concatenate([copies, new])), torch.from_numpy(train))
    assert result.value == 0.25
    assert result.nearest[:25].tolist() == list(range(25))
    distances = np.sort(cdist(np.concatenate([copies, new]), train), axis=1)
    np.testing.assert_allclose(result.scores, distances[:, 0] / distances[:, 1], rtol=1e-9)
    assert result.value == np.mean(distances[:, 0] / distances[:, 1] < 1 / 3)


def test_exact_copies_score_zero_and_ties_are_stable() -> None:
    train = torch.tensor([[1e4, 0.0], [0.0, 1e4], [1e4, 0.0], [5.0, 5.0]], dtype=torch.float32)
    result = memorization_ratio(train, train)
    assert result.scores.tolist() == [0, 0, 0, 0]
    assert result.nearest.tolist() == [0, 1, 0, 3]  # the duplicate's copy is nearest to the first of the two
    middle = memorization_ratio(torch.tensor([[5e3, 5e3]]), train[:2])
    assert middle.scores.tolist() == [1]
    assert middle.value == 0


def test_threshold_decides(rng: np.random.Generator) -> None:
    fake, train = torch.from_numpy(rng.standard_normal((64, 4))), torch.from_numpy(rng.standard_normal((64, 4)))
    scores = memorization_ratio(fake, train).scores
    for threshold in (0.1, 1 / 3, 0.7, 1.0):
        assert memorization_ratio(fake, train, threshold).value == float((scores < threshold).double().mean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: frechet_distance(x[:1], x), "x has 1 rows; expected at least 2"),
        (lambda x: frechet_distance(x, x[:, :2]), "y has 2 dimensions where the other set has 4"),
        (lambda x: frechet_distance(x[0], x), r"x has shape \(4,\); expected \(N, D\)"),
        (lambda x: frechet_distance(x, x / 0), "y holds NaN or Inf"),
        (lambda x: memorization_ratio(x, x[:1]), "train has 1 rows; expected at least 2"),
        (lambda x: memorization_ratio(x[:0], x), "fake has 0 rows"),
        (lambda x: memorization_ratio(x, x, 0), r"threshold is 0; expected a number in \(0, 1\]"),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.arange(20.0).view(5, 4))  # type: ignore[operator]

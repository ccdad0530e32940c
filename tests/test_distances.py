"""Distribution metrics against scipy, published packages and closed forms, on ordinary and on degenerate sets."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import stats
from torch import Tensor, nn

from mlflow_icr import (
    ct_score,
    density_coverage,
    fld,
    fld_gap,
    frechet_distance,
    frechet_distance_infinity,
    inception_score,
    kernel_distance,
    mifid,
    precision_recall,
    vendi_score,
)
from mlflow_icr.generation.manifold import balls_around


class Embedding(nn.Module):
    """For torchmetrics: images that are embeddings already, (N, D) as (N, 3, 1, D) uint8-free floats."""

    num_features = 12

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0, 0]


def as_images(x: Tensor) -> Tensor:
    return x[:, None, None].expand(-1, 3, 1, -1)


@pytest.fixture
def pair(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    mix = rng.standard_normal((12, 12))
    return torch.from_numpy(rng.standard_normal((300, 12)) @ mix + 1), torch.from_numpy(rng.standard_normal((200, 12)) @ mix)


def scipys(x: Tensor, y: Tensor) -> float:
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(cx @ cy).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx + cy - 2 * root))


def test_frechet_distance_is_scipys_at_any_scale_and_torchmetrics(pair: tuple[Tensor, Tensor]) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    x, y = pair
    for scale in (1e-4, 1.0, 1e4):
        assert frechet_distance(x * scale, y * scale) == pytest.approx(scipys(x * scale, y * scale), rel=1e-6)
    metric = FrechetInceptionDistance(Embedding(), normalize=True).set_dtype(torch.float64)
    metric.update(as_images(x), real=True)
    metric.update(as_images(y), real=False)
    assert frechet_distance(x, y) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_regular_and_singular_paths_agree(pair: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pair
    regular = frechet_distance(x, y)
    # A dimension that is the same in all rows makes the covariance singular, and changes nothing but the mean.
    wider = [torch.cat([z, torch.full((len(z), 1), 3.0, dtype=torch.float64)], 1) for z in pair]
    assert frechet_distance(*wider) == pytest.approx(regular, rel=1e-9)
    doubled = [torch.cat([z, z], 1) for z in pair]  # a combination of others
    assert frechet_distance(*doubled) == pytest.approx(2 * regular, rel=1e-6)
    repeated = torch.cat([x, x])
    assert math.isfinite(frechet_distance(repeated, y))
    assert frechet_distance(x[:2], y[:2]) >= 0
    assert frechet_distance(torch.ones(3, 4), torch.zeros(5, 4)) == pytest.approx(4)
    with pytest.raises(ValueError, match="x has 1 rows"):
        frechet_distance(x[:1], y)


def test_frechet_distance_in_one_dimension_is_wassersteins(rng: np.random.Generator) -> None:
    """Of Gaussians in one dimension it is (m - n)^2 + (s - t)^2."""
    x, y = rng.standard_normal((50, 1)) * 3 + 2, rng.standard_normal((70, 1))
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-9)


def test_extrapolation_takes_the_bias_away(rng: np.random.Generator) -> None:
    """Two samples of one Gaussian: the distance of 500 in 20 dimensions is far from 0, its extrapolation is not."""
    y = torch.from_numpy(rng.standard_normal((20_000, 20)))
    plain, infinite = [], []
    for seed in range(6):
        x = torch.from_numpy(rng.standard_normal((500, 20)))
        plain.append(frechet_distance(x, y))
        infinite.append(frechet_distance_infinity(x, y, seed))
    assert np.mean(plain) > 0.05
    assert abs(np.mean(infinite)) < 0.2 * np.mean(plain)
    assert frechet_distance_infinity(x, y, 3) == frechet_distance_infinity(x, y, 3)
    with pytest.raises(ValueError, match="x has 19 rows; expected at least 20"):
        frechet_distance_infinity(y[:19], y, 0)


def test_kernel_distance_is_the_definition_and_torchmetrics(pair: tuple[Tensor, Tensor]) -> None:
    from torchmetrics.image.kid import poly_mmd

    x, y = pair
    k = lambda a, b: (a @ b.T / 12 + 1) ** 3  # noqa: E731
    n = 200
    pairs = [k(z, z).sum() - k(z, z).diagonal().sum() for z in (x[:n], y)]
    by_hand = float((pairs[0] + pairs[1]) / (n * (n - 1)) - 2 * k(x[:n], y).mean())
    mean, std = kernel_distance(x[:n], y, num_subsets=3, subset_size=n)
    assert mean == pytest.approx(by_hand, rel=1e-10)  # a subset of all is all
    assert std == pytest.approx(0, abs=1e-9 * abs(mean))
    theirs = poly_mmd(x[:n], y)
    assert mean == pytest.approx(float(theirs), rel=1e-9)
    some = kernel_distance(x, y, num_subsets=20, subset_size=50, seed=4)
    assert some == kernel_distance(x, y, num_subsets=20, subset_size=50, seed=4)
    assert some != kernel_distance(x, y, num_subsets=20, subset_size=50, seed=5)
    with pytest.raises(ValueError, match="subset_size is 201; expected at most 200"):
        kernel_distance(x, y, subset_size=201)


def test_kernel_distance_has_no_bias(rng: np.random.Generator) -> None:
    values = [
        kernel_distance(*(torch.from_numpy(rng.standard_normal((30, 8))) for _ in range(2)), num_subsets=1, subset_size=30)[0]
        for _ in range(300)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / 300**0.5
    assert min(values) < 0


def test_manifold_metrics_are_prdcs(rng: np.random.Generator) -> None:
    from prdc import compute_prdc

    for shift in (0.0, 0.7, 30.0):
        real, fake = rng.standard_normal((150, 6)), 0.8 * rng.standard_normal((110, 6)) + shift
        x, y = torch.from_numpy(real), torch.from_numpy(fake)
        for k in (3, 5):
            theirs = compute_prdc(real, fake, nearest_k=k)
            assert precision_recall(x, y, k) == pytest.approx((theirs["precision"], theirs["recall"]))
            assert density_coverage(x, y, k) == pytest.approx((theirs["density"], theirs["coverage"]))
    # Another peer's conventions: k = 3, and the same sets.
    assert precision_recall(x, x) == (1, 1)
    # Each of 150 points is in the balls of those it is a 5-neighbour of, and in its own: 1 + 1/k on average.
    assert density_coverage(x, x) == (pytest.approx(1.2), 1)


def test_balls_are_exact_at_their_border() -> None:
    """Copies of duplicates are inside balls of radius 0, and a point exactly on a border is inside."""
    points = torch.tensor([[1e6, 1.0], [1e6, 1.0], [1e6, 4.0], [1e6, 4.0], [1e6 + 3, 4.0]], dtype=torch.float64)
    assert precision_recall(points, points, k=1) == (1, 1)
    assert precision_recall(points[:4], points[:4] + 1e-3, k=1)[0] == 0
    counts = balls_around(points, points[:1], torch.tensor([3.0], dtype=torch.float64))
    assert counts.tolist() == [1, 1, 1, 1, 0]
    parts = balls_around(points, points, torch.full((5,), 3.0, dtype=torch.float64), budget_bytes=1)
    assert torch.equal(parts, balls_around(points, points, torch.full((5,), 3.0, dtype=torch.float64)))
    assert density_coverage(torch.ones(4, 2), torch.ones(3, 2), k=2) == (2, 1)  # four balls of radius 0, over k
    with pytest.raises(ValueError, match="k is 5; expected 1 to 4, the other rows of real"):
        precision_recall(points, points, k=5)


def test_inception_score_is_torchmetrics_and_has_its_bounds(rng: np.random.Generator) -> None:
    from torchmetrics.image.inception import InceptionScore

    logits = torch.from_numpy(rng.standard_normal((90, 12)) * 2)
    metric = InceptionScore(Embedding(), splits=1)
    metric.update(as_images(logits))
    assert inception_score(logits.softmax(1)) == pytest.approx(float(metric.compute()[0]), rel=1e-6)
    assert inception_score(torch.eye(7)) == pytest.approx(7)
    assert inception_score(torch.full((5, 4), 0.25)) == pytest.approx(1)
    with pytest.raises(ValueError, match="not probabilities"):
        inception_score(logits)


def test_vendi_score_is_the_published_one(rng: np.random.Generator) -> None:
    from vendi_score import vendi

    for shape in ((40, 6), (15, 60)):
        x = rng.standard_normal(shape) + 0.5
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        assert vendi_score(torch.from_numpy(x)) == pytest.approx(vendi.score_dual(unit, normalize=False), rel=1e-6)
    assert vendi_score(torch.eye(9)) == pytest.approx(9)
    assert vendi_score(torch.ones(9, 3)) == pytest.approx(1)
    assert vendi_score(torch.eye(3).repeat(4, 1)) == pytest.approx(3)  # duplicates count once
    assert vendi_score(torch.ones(1, 3)) == pytest.approx(1)
    with pytest.raises(ValueError, match="all 0"):
        vendi_score(torch.zeros(2, 3))


def test_mifid_is_torchmetrics_with_the_roles_as_in_the_paper(pair: tuple[Tensor, Tensor]) -> None:
    from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

    train = pair[0]
    near = train[:100] + 0.05 * pair[1][:100]
    for fake in (near, pair[1]):
        # The mean is over what torchmetrics calls real; the distance itself is symmetric.
        metric = MemorizationInformedFrechetInceptionDistance(Embedding(), normalize=True).set_dtype(torch.float64)
        metric.update(as_images(fake), real=True)
        metric.update(as_images(train), real=False)
        assert mifid(train, fake) == pytest.approx(float(metric.compute()), rel=1e-5)
    assert mifid(train, near) > 10 * frechet_distance(train, near)
    assert math.isinf(mifid(train, train[:50]))


def gaussian_nll(x: Tensor, centre: Tensor, variance: float) -> float:
    d = x.shape[1]
    return float((0.5 * (x - centre).square().sum(1) / variance / d).mean() + 0.5 * math.log(2 * math.pi * variance))


def test_fld_of_one_gaussian_is_a_closed_form(rng: np.random.Generator) -> None:
    """With one generated embedding at the mean there is one variance to fit: the mean squared distance per dimension."""
    train, test = (torch.from_numpy(rng.standard_normal((n, 8))) for n in (4000, 3000))
    mean, deviation = test.mean(0), test.std(0)
    fake = mean[None]
    gap = fld_gap(train, test, fake)
    a, b = (train - mean) / deviation, (test - mean) / deviation
    centre = torch.zeros(1, 8, dtype=torch.float64)
    variance = float(a.square().mean())
    expected = 100 * (gaussian_nll(a, centre, variance) - gaussian_nll(b, centre, variance))
    # The extra component that is there while fitting takes a share of the likelihood, and moves the variance a little.
    assert gap == pytest.approx(expected, abs=0.3)


def test_fld_rises_with_copies_and_with_bad_samples(rng: np.random.Generator) -> None:
    draw = lambda n: torch.from_numpy(rng.standard_normal((n, 10)) * np.linspace(0.5, 2, 10))  # noqa: E731
    train, test, good = draw(400), draw(400), draw(200)
    copies = train[:200] + 1e-3 * draw(200)
    bad = draw(200) + 3
    values = {name: fld(train, test, fake) for name, fake in (("good", good), ("copies", copies), ("bad", bad))}
    assert abs(values["good"]) < 5  # as good as half of the training set
    assert values["copies"] > values["good"] + 20
    assert values["bad"] > values["good"] + 20
    assert fld_gap(train, test, copies) < fld_gap(train, test, good) - 50
    assert fld(train, test, good, seed=1) == fld(train, test, good, seed=1)
    # Units of a dimension do not matter, nor does one that says nothing.
    wide = [torch.cat([1e3 * z, torch.full((len(z), 1), 7.0, dtype=torch.float64)], 1) for z in (train, test, good)]
    assert fld_gap(*wide) == pytest.approx(fld_gap(train, test, good) * 10 / 11, abs=2)


def test_ct_is_a_normal_deviate_where_nothing_is_copied_and_far_below_where_it_is(rng: np.random.Generator) -> None:
    draw = lambda n: torch.from_numpy(rng.standard_normal((n, 5)))  # noqa: E731
    scores = [ct_score(draw(400), draw(200), draw(200), seed) for seed in range(30)]
    # An average of three deviates, weighted by shares: narrower than one, and around 0.
    assert abs(np.mean(scores)) < 4 * np.std(scores) / 30**0.5 + 0.1
    assert np.std(scores) < 1.2
    train = draw(400)
    assert ct_score(train, draw(200), train[:200] + 0.01 * draw(200), 0) < -5
    assert ct_score(train, draw(200), 4 * draw(200), 0) > 3
    with pytest.raises(ValueError, match="no cell holds"):
        ct_score(train, draw(200), draw(10), 0)


def test_ct_in_one_cell_is_scipys_test(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.spatial.distance import cdist

    monkeypatch.setattr("mlflow_icr.generation.generalization.CT_CELLS", 1)
    train, test, fake = (rng.standard_normal((n, 4)) for n in (150, 60, 80))
    to_test, to_fake = (cdist(x, train).min(1) for x in (test, fake))
    found = ct_score(*(torch.from_numpy(x) for x in (train, test, fake)), 0)
    p = stats.mannwhitneyu(to_fake, to_test, alternative="less", method="asymptotic").pvalue
    assert stats.norm.cdf(found) == pytest.approx(p, abs=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fld(x[:3], x, x), "train has 3 rows; expected at least 4"),
        (lambda x: mifid(x, x[:, :2]), "fake has 2 dimensions where the other set has 4"),
        (lambda x: kernel_distance(x, x, subset_size=1), "subset_size 1; expected at least 1 and 2"),
        (lambda x: vendi_score(x / 0), "x holds NaN or Inf"),
        (lambda x: density_coverage(x, x[:0]), "fake has 0 rows"),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.arange(20.0).view(5, 4))  # type: ignore[operator]

"""Every score against a published package, a closed form or brute force, on ordinary, degenerate and scaled embeddings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mlflow_icr import (
    authenticity,
    carlini_ratio,
    copy_similarity,
    ct_score,
    density_coverage,
    fld_gap,
    frechet_distance,
    inception_score,
    kernel_distance,
    memorization_ratio,
    mifid,
    precision_recall,
    vendi_score,
)

REGULAR = ["random", "rank-deficient", "small", "large"]
KINDS = [*REGULAR, "duplicated", "constant", "single"]


def sets(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Training (120, 10) and generated embeddings (80, 10), of which the first 15 are near copies."""
    train, fake = rng.standard_normal((120, 10)) + 0.5, rng.standard_normal((80, 10)) + 0.7
    fake[:15] = train[:15] + 0.02 * rng.standard_normal((15, 10))
    if kind == "rank-deficient":
        mix = np.zeros((10, 10))
        mix[:3] = rng.standard_normal((3, 10))
        train, fake = train @ mix, fake @ mix
    elif kind == "small":
        train, fake = 1e-4 * train, 1e-4 * fake
    elif kind == "large":
        train, fake = 1e4 * train, 1e4 * fake
    elif kind == "duplicated":
        train, fake = np.repeat(train[:30], 4, axis=0), np.repeat(train[:20], 4, axis=0)
    elif kind == "constant":
        train[:], fake[:] = 2.5, 2.5
    elif kind == "single":
        fake = fake[:1]
    return train, fake


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1))


def among(x: np.ndarray) -> np.ndarray:
    found = distances(x, x)
    np.fill_diagonal(found, np.inf)
    return found


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (y / np.linalg.norm(y, axis=1, keepdims=True)).T


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.array([0.0 if a == 0 else math.inf if b == 0 else a / b for a, b in zip(above, below, strict=True)])


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("kind", KINDS)
def test_detectors_are_brute_force(kind: str, rng: np.random.Generator) -> None:
    train, fake = sets(kind, rng)
    x, y = tensors(fake, train)
    d = distances(fake, train)
    near, nearest = np.sort(d, axis=1), d.argmin(1)

    expected = ratio(near[:, 0], near[:, 1])
    found = memorization_ratio(x, y)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-9)
    assert found.value == np.mean(expected < 1 / 3)
    assert found.nearest.tolist() == nearest.tolist()

    expected = ratio(near[:, 0], 0.5 * near[:, :20].mean(1))
    carlini = carlini_ratio(x, y, k=20)
    np.testing.assert_allclose(carlini.scores, expected, rtol=1e-9)
    assert carlini.value == np.mean(expected < 1)

    own = among(train).min(1)[nearest]
    authentic = authenticity(y, x)
    np.testing.assert_allclose(authentic.scores, ratio(near[:, 0], own), rtol=1e-9)
    assert authentic.value == np.mean(own < near[:, 0])

    similar, train_similar = cosines(fake, train), cosines(train, train)
    np.fill_diagonal(train_similar, -1)
    copies = copy_similarity(x, y, threshold=0.995)
    np.testing.assert_allclose(copies.scores, similar.max(1), atol=1e-12)
    np.testing.assert_allclose(copies.train_scores, train_similar.max(1), atol=1e-12)
    assert copies.value == np.mean(similar.max(1) > 0.995)
    assert copies.train_value == np.mean(train_similar.max(1) > 0.995)


@pytest.mark.parametrize("kind", KINDS)
def test_mifid_is_its_definition(kind: str, rng: np.random.Generator) -> None:
    train, fake = sets(kind, rng)
    y, x = tensors(train, fake)
    if kind == "single":
        with pytest.raises(ValueError, match="fake has 1 rows; expected at least 2"):
            mifid(y, x)
        return
    if kind in ("constant", "duplicated"):  # every generated embedding is a training one
        assert mifid(y, x) == math.inf
        return
    for generated in (fake, fake[:15], -fake[:15], fake[15:]):  # an opposite is as near as a copy
        minimal = float((1 - np.abs(cosines(generated, train))).min(1).mean())
        divisor = minimal if minimal < 0.1 else 1.0
        expected = frechet_distance(torch.from_numpy(generated), y) / divisor
        assert mifid(y, torch.from_numpy(generated)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", [*REGULAR, "duplicated", "constant"])
def test_ct_is_a_count_of_pairs_in_each_cell(kind: str, rng: np.random.Generator) -> None:
    from sklearn.cluster import KMeans

    train, fake = sets(kind, rng)
    fake, test = np.concatenate([fake, fake]), sets(kind, rng)[0]
    cells = KMeans(3, random_state=0, n_init=10)
    labels = [cells.fit(train).labels_, cells.predict(test), cells.predict(fake)]
    scores, shares = [], []
    for cell in range(3):
        own, held, made = (z[mine == cell] for z, mine in zip((train, test, fake), labels, strict=True))
        if len(held) == 0 or len(made) < 20:
            continue
        to_held, to_made = distances(held, own).min(1), distances(made, own).min(1)
        u = sum((a > b) + 0.5 * (a == b) for a in to_made for b in to_held)
        n, m = len(held), len(made)
        scores.append((u - n * m / 2 + 0.5) / math.sqrt(n * m * (n + m + 1) / 12))
        shares.append(n)
    found = ct_score(*tensors(train, test, fake), seed=0)
    assert found == pytest.approx(float(np.average(scores, weights=shares)), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_manifold_scores_are_brute_force_and_prdcs_where_nothing_is_on_a_border(kind: str, rng: np.random.Generator) -> None:
    from prdc import compute_prdc

    real, fake = sets(kind, rng)
    x, y = tensors(real, fake)
    d = distances(fake, real)
    radii = np.sort(among(real), axis=1)[:, 4]
    inside = d <= radii
    density, coverage = density_coverage(x, y, 5)
    assert density == pytest.approx(inside.sum(1).mean() / 5)
    assert coverage == np.mean(d.min(0) <= radii)
    if kind == "single":
        with pytest.raises(ValueError, match="fake has 1 rows; expected at least 2"):
            precision_recall(x, y, 5)
        return
    back = distances(real, fake) <= np.sort(among(fake), axis=1)[:, 4]
    assert precision_recall(x, y, 5) == (inside.any(1).mean(), back.any(1).mean())
    theirs = compute_prdc(real, fake, nearest_k=5)
    if kind in REGULAR:
        assert precision_recall(x, y, 5) == pytest.approx((theirs["precision"], theirs["recall"]))
        assert (density, coverage) == pytest.approx((theirs["density"], theirs["coverage"]))
    if kind == "constant":  # its balls are open: those of radius 0 hold not even a copy, and ours do
        assert (precision_recall(x, y, 5), density, coverage) == ((1, 1), 120 / 5, 1)
        assert (theirs["precision"], theirs["coverage"]) == (0, 0)


@pytest.mark.parametrize("kind", [*REGULAR, "duplicated", "constant"])
def test_kernel_distance_is_torchmetrics(kind: str, rng: np.random.Generator) -> None:
    from torchmetrics.image.kid import poly_mmd

    x, y = (z[:80] for z in tensors(*sets(kind, rng)))
    found, deviation = kernel_distance(x, y, num_subsets=2, subset_size=80)
    size = float(((x.square().sum(1) / 10 + 1) ** 3).mean())  # of the kernel, whose rounding decides
    assert found == pytest.approx(float(poly_mmd(x, y)), rel=1e-9, abs=1e-12 * size)
    assert deviation == pytest.approx(0, abs=1e-12 * size)


@pytest.mark.parametrize("kind", KINDS)
def test_vendi_score_is_the_published_one(kind: str, rng: np.random.Generator) -> None:
    from vendi_score import vendi

    x = sets(kind, rng)[1]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    # Both lose about 1e-15 in each of the eigenvalues that are 0, whose entropy is 35 times that.
    assert vendi_score(torch.from_numpy(x)) == pytest.approx(vendi.score_K(unit @ unit.T), rel=1e-9)
    if kind == "duplicated":
        assert vendi_score(torch.from_numpy(x)) == pytest.approx(vendi_score(torch.from_numpy(x[::4])), rel=1e-9)
    if kind in ("constant", "single"):
        assert vendi_score(torch.from_numpy(x)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0])
@pytest.mark.parametrize("rows", [1, 90])
def test_inception_score_is_torchmetrics_from_flat_to_certain(scale: float, rows: int, rng: np.random.Generator) -> None:
    from torchmetrics.image.inception import InceptionScore

    class Logits(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0, 0]

    logits = torch.from_numpy(rng.standard_normal((rows, 12)) * scale)
    metric = InceptionScore(Logits(), splits=1)
    metric.update(logits[:, None, None].expand(-1, 3, 1, -1))
    assert inception_score(logits.softmax(1)) == pytest.approx(float(metric.compute()[0]), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("times", [1, 5])
def test_frechet_distance_of_commuting_gaussians_is_the_closed_form(scale: float, times: int, rng: np.random.Generator) -> None:
    """(m - n)^2 + (s - t)^2 summed over axes: also where an axis is constant, and where each row stands several times."""
    z = torch.from_numpy(rng.standard_normal((400, 6)))
    z = torch.linalg.qr(z - z.mean(0)).Q * 399**0.5  # exactly uncorrelated, of unit variance
    s, t = torch.tensor([1.0, 2, 3, 0, 0, 1e-3]).double(), torch.tensor([3.0, 2, 0, 1, 0, 0]).double()
    shift = torch.linspace(-1, 1, 6, dtype=torch.float64)
    x, y = scale * (z * s + shift), scale * z * t
    # A row that stands r times leaves the mean, and r (n - 1) / (r n - 1) of the variance.
    shrink = (times * 399 / (times * 400 - 1)) ** 0.5
    expected = scale**2 * float(shift.square().sum() + (shrink * s - t).square().sum())
    assert frechet_distance(x.repeat(times, 1), y) == pytest.approx(expected, rel=1e-7)
    rotation = torch.linalg.qr(torch.from_numpy(rng.standard_normal((6, 6)))).Q
    assert frechet_distance(x.repeat(times, 1) @ rotation, y @ rotation) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("kind", ["random", "rank-deficient", "small", "large"])
def test_frechet_distance_is_torchmetrics(kind: str, rng: np.random.Generator) -> None:
    from torchmetrics.image.fid import _compute_fid

    x, y = tensors(*sets(kind, rng))
    theirs = float(_compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov()))
    assert frechet_distance(x, y) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("times", [1, 4])
def test_fld_knows_neither_units_nor_how_often_samples_are_repeated(scale: float, times: int, rng: np.random.Generator) -> None:
    """Repeated samples are the same mixture. The closed form of one Gaussian is in test_distances."""
    train, test = (torch.from_numpy(rng.standard_normal((n, 8)) * np.linspace(1, 2, 8)) for n in (300, 200))
    copies = train[:20] + 0.01 * test[:20]
    train[:, 0], test[:, 0], copies[:, 0] = 0.1, 0.1, 0.1  # a dimension that says nothing
    for fake in (test[:1], copies):
        found = fld_gap(scale * train, scale * test, scale * fake.repeat(times, 1))
        assert found == pytest.approx(fld_gap(train, test, fake), rel=1e-3)  # where the fit stops moves a little
    assert found < -10  # of copies

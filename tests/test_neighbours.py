"""Exact nearest neighbours against brute force, and the detectors that are made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from mlflow_icr import authenticity, carlini_ratio, copy_similarity, memorization_ratio
from mlflow_icr.generation import k_nearest, neighbours
from mlflow_icr.generation.embeddings import check_embeddings


def brute(x: np.ndarray, y: np.ndarray, k: int, exclude_self: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """By differences in float64, ties by index."""
    squared = ((x[:, None].astype(np.float64) - y[None].astype(np.float64)) ** 2).sum(-1)
    if exclude_self:
        np.fill_diagonal(squared, np.inf)
    order = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return np.sqrt(np.take_along_axis(squared, order, 1)), order


def sets(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    x, y = rng.standard_normal((40, 24)), rng.standard_normal((70, 24))
    if kind == "copies":
        x[:20] = y[10:30]
    elif kind == "duplicates":
        y[30:60] = y[3]  # more than the spare candidates
        x[:5] = y[3] + 1e-9
    elif kind == "constant":
        x[:], y[:] = 2.5, 2.5
    elif kind == "integers":
        x, y = rng.integers(0, 2, (40, 4)).astype(float), rng.integers(0, 2, (70, 4)).astype(float)  # ties everywhere
    elif kind == "far":
        x, y = x + 1e5, y + 1e5
    elif kind == "line":
        x, y = x * np.eye(24)[0], y * np.eye(24)[0]
    elif kind == "close":
        y = y[:1] + 1e-7 * y  # nearer to each other than float32 can tell
    return x, y


@pytest.mark.parametrize("kind", ["plain", "copies", "duplicates", "constant", "integers", "far", "line", "close"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbours_are_those_of_brute_force(rng: np.random.Generator, kind: str, dtype: torch.dtype) -> None:
    x, y = (torch.from_numpy(part).to(dtype) for part in sets(kind, rng))
    for k in (1, 3, 70):
        found = k_nearest(x, y, k)
        distances, indices = brute(x.numpy(), y.numpy(), k)
        assert np.array_equal(found.indices, indices)
        np.testing.assert_allclose(found.distances, distances, rtol=1e-12)
    own = k_nearest(y, y, 4, exclude_self=True)
    distances, indices = brute(y.numpy(), y.numpy(), 4, exclude_self=True)
    assert np.array_equal(own.indices, indices)
    np.testing.assert_allclose(own.distances, distances, rtol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "duplicates", "integers"])
def test_the_budget_changes_nothing_but_the_blocks(rng: np.random.Generator, kind: str) -> None:
    x, y = (torch.from_numpy(part) for part in sets(kind, rng))
    whole = k_nearest(x, y, 3)
    for budget in (1, 20_000, 200_000):
        parts = k_nearest(x, y, 3, budget_bytes=budget)
        assert torch.equal(parts.indices, whole.indices)
        assert torch.equal(parts.distances, whole.distances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_the_budget_is_kept(dtype: torch.dtype) -> None:
    """The largest tensor that a search makes, seen by torch itself."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for part in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(part, Tensor) and part.untyped_storage().data_ptr() not in given:
                    largest = max(largest, part.untyped_storage().nbytes())
            return result

    x, y = ((torch.rand(n, 64) * 255).to(dtype) for n in (900, 3000))
    given = {z.untyped_storage().data_ptr() for z in (x, y)}
    budget = 2**19  # the distances alone would be 20 times that
    largest = 0
    with Watch():
        k_nearest(*(check_embeddings(name, z, at_least=2) for name, z in (("x", x), ("y", y))), 2, budget_bytes=budget)
    assert 0 < largest <= budget


def test_far_more_neighbours_than_there_are_is_refused() -> None:
    x = torch.randn(5, 2)
    with pytest.raises(ValueError, match="k is 5; expected 1 to 4"):
        k_nearest(x, x, 5, exclude_self=True)
    with pytest.raises(ValueError, match="k is 0; expected 1 to 5"):
        k_nearest(x, x, 0)


def test_doubtful_rows_are_the_exception(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """On ordinary embeddings the proposals suffice, so that the search costs a matrix product."""
    calls = []
    exact = neighbours._exact

    def count(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        calls.append(len(x))
        return exact(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(neighbours, "_exact", count)
    for d in (3, 64, 768):
        k_nearest(torch.randn(300, d), torch.randn(2000, d), 2)
    assert sum(calls) <= 9  # of 900 rows


@pytest.mark.parametrize("precision", ["medium", "autocast"])
def test_coarse_products_of_the_caller_change_nothing(rng: np.random.Generator, precision: str) -> None:
    y = rng.standard_normal((400, 64)) * 1e-3 + rng.standard_normal(64)  # near each other: bfloat16 cannot tell them apart
    x = y[:50] + 1e-5 * rng.standard_normal((50, 64))
    x, y = (torch.from_numpy(z).float() for z in (x, y))
    expected = brute(x.double().numpy(), y.double().numpy(), 2)[1]
    before = torch.get_float32_matmul_precision()
    try:
        if precision == "medium":
            torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            found = k_nearest(x, y, 2)
    finally:
        torch.set_float32_matmul_precision(before)
    assert np.array_equal(found.indices, expected)


def test_pixels_in_eight_bits_are_the_numbers_that_they_are(rng: np.random.Generator) -> None:
    train, fake = (torch.from_numpy(rng.integers(0, 256, (n, 48), dtype=np.uint8)) for n in (150, 40))
    fake[:9] = train[:9]
    fake[9:12] = 255 - (255 - train[9:12]).clamp(min=1)  # a subtraction of bytes would wrap around
    for search in (memorization_ratio, carlini_ratio, copy_similarity):
        a, b = search(fake, train), search(fake.double(), train.double())
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.nearest, b.nearest)
        assert a.value == b.value > 0
    distances, nearest = brute(fake.double().numpy(), train.double().numpy(), 2)
    found = k_nearest(fake, train, 2)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-12)
    assert np.array_equal(found.indices, nearest)
    assert torch.equal(authenticity(train, fake).scores, authenticity(train.double(), fake.double()).scores)


def test_detectors_are_their_definitions(rng: np.random.Generator) -> None:
    train, fake = rng.standard_normal((120, 10)), rng.standard_normal((60, 10))
    fake[:12] = train[:12] + 0.01 * rng.standard_normal((12, 10))
    x, y = torch.from_numpy(fake), torch.from_numpy(train)
    d = np.sort(cdist(fake, train), axis=1)
    nearest = cdist(fake, train).argmin(1)

    ratio = memorization_ratio(x, y)
    np.testing.assert_allclose(ratio.scores, d[:, 0] / d[:, 1], rtol=1e-12)
    assert ratio.value == np.mean(d[:, 0] / d[:, 1] < 1 / 3)

    carlini = carlini_ratio(x, y, k=50)
    np.testing.assert_allclose(carlini.scores, d[:, 0] / (0.5 * d[:, :50].mean(1)), rtol=1e-12)
    assert carlini.value == np.mean(np.array(carlini.scores) < 1)

    cosine = 1 - cdist(fake, train, "cosine")
    copies = copy_similarity(x, y, threshold=0.9)
    np.testing.assert_allclose(copies.scores, cosine.max(1), atol=1e-12)
    assert np.array_equal(copies.nearest, cosine.argmax(1))
    own = 1 - cdist(train, train, "cosine")
    np.fill_diagonal(own, -1)
    np.testing.assert_allclose(copies.train_scores, own.max(1), atol=1e-12)
    assert copies.train_value == np.mean(own.max(1) > 0.9)

    among = cdist(train, train)
    np.fill_diagonal(among, np.inf)
    authentic = authenticity(y, x)
    expected = among.min(1)[nearest] < d[:, 0]
    assert authentic.value == expected.mean()
    np.testing.assert_allclose(authentic.scores, d[:, 0] / among.min(1)[nearest], rtol=1e-12)
    for found in (ratio, carlini, authentic):
        assert np.array_equal(found.nearest, nearest)
        assert found.low <= found.value <= found.high


def test_exact_copies_and_duplicates() -> None:
    train = torch.tensor([[1e4, 0.0], [0.0, 1e4], [1e4, 0.0], [5.0, 5.0]])
    assert memorization_ratio(train, train).scores.tolist() == [0, 0, 0, 0]
    assert carlini_ratio(train, train, k=2).scores.tolist() == [0, 0, 0, 0]
    authentic = authenticity(train, train)
    assert authentic.value == 0
    assert authentic.scores.tolist() == [0, 0, 0, 0]
    new = authenticity(train, torch.tensor([[1e4, 7.0]]))
    assert math.isinf(float(new.scores[0]))  # its neighbour has a twin at distance 0
    assert new.value == 1
    same = copy_similarity(train[:2], train, threshold=0.8)
    assert same.scores.tolist() == [1, 1]
    assert same.train_value == 0.5  # the twins; the one between the axes has a cosine of 0.707 with each


def test_intervals_of_shares_are_exact() -> None:
    """Against the tails of the binomial distribution: at each bound the share that was found has a probability of 2.5 %."""
    from scipy import stats

    train = torch.eye(4)
    for copies, total in ((0, 128), (15, 100), (100, 100)):
        fake = torch.cat([train[:1].repeat(copies, 1), torch.full((total - copies, 4), 0.5)])
        found = memorization_ratio(fake, train)
        assert found.value == copies / total
        low, high = found.low, found.high
        assert low == 0 if copies == 0 else stats.binom.sf(copies - 1, total, low) == pytest.approx(0.025)
        assert high == 1 if copies == total else stats.binom.cdf(copies, total, high) == pytest.approx(0.025)
    none = memorization_ratio(torch.full((128, 4), 0.5), train)
    assert (none.low, round(none.high, 3)) == (0, 0.028)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: carlini_ratio(x, x, k=6), "k is 6; expected 2 to 5"),
        (lambda x: carlini_ratio(x, x, k=2, threshold=0), "threshold is 0"),
        (lambda x: copy_similarity(x, x, threshold=1), r"threshold is 1; expected a number in \(-1, 1\)"),
        (lambda x: copy_similarity(x * 0, x), "fake holds an embedding that is all 0"),
        (lambda x: authenticity(x[:1], x), "train has 1 rows; expected at least 2"),
        (lambda x: authenticity(x, x[:, :2]), "fake has 2 dimensions|train has 4 dimensions"),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.arange(20.0).view(5, 4) + 1)  # type: ignore[operator]

"""Neighbours by an index: exact distances, a recall that is true, and copies that are found."""

from __future__ import annotations

import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from mlflow_icr import authenticity, carlini_ratio, copy_similarity, memorization_ratio
from mlflow_icr.generation import index_nearest, k_nearest

pytest.importorskip("faiss", reason="faiss is not installed (pip install 'mlflow-icr[faiss]')")


def clusters(rng: np.random.Generator, rows: int, centres: np.ndarray) -> np.ndarray:
    return centres[rng.integers(0, len(centres), rows)] + 0.3 * rng.standard_normal((rows, centres.shape[1]))


@pytest.fixture
def clustered(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """600 queries and 20 000 rows of 24 dimensions in 50 clusters; the first 100 queries are copies, moved a little or not."""
    centres = rng.standard_normal((50, 24))
    y = clusters(rng, 20_000, centres)
    x = clusters(rng, 600, centres)
    x[:50] = y[100:150]
    x[50:100] = y[200:250] + 1e-3 * rng.standard_normal((50, 24))
    return torch.from_numpy(x).float(), torch.from_numpy(y).float()


def brute(x: Tensor, y: Tensor, k: int) -> np.ndarray:
    return np.sort(cdist(x.double().numpy(), y.double().numpy()), axis=1)[:, :k]


@pytest.mark.parametrize("probes", [1, 8, 10_000])
def test_the_recall_is_that_of_exact_search(clustered: tuple[Tensor, Tensor], probes: int) -> None:
    x, y = clustered
    found = index_nearest(x, y, 3, probes=probes, recall_queries=600)
    exact = brute(x, y, 3)
    measured = float((found.distances.numpy() <= exact[:, -1:] * (1 + 1e-9)).mean())
    assert found.recall == pytest.approx(measured, abs=1e-12)
    # Whatever was found is at its exact distance.
    true = (x[:, None].double() - y[found.indices].double()).norm(dim=2)
    torch.testing.assert_close(found.distances, true, rtol=1e-12, atol=0)
    assert bool((found.distances.diff(dim=1) >= 0).all())
    if probes == 1:
        assert found.recall < 0.9  # a real loss, and it is reported
    if probes == 10_000:  # all cells
        assert found.recall == 1
        assert torch.equal(found.indices, k_nearest(x, y, 3).indices)
    sampled = index_nearest(x, y, 3, probes=probes, recall_queries=150)
    assert sampled.recall == pytest.approx(found.recall, abs=4 * (0.25 / 150) ** 0.5)


def test_copies_are_found_at_their_distance_also_in_bytes(clustered: tuple[Tensor, Tensor]) -> None:
    x, y = clustered
    # Rows of 24 float32 and a number are 104 bytes, of bytes 32: the second budget holds only those.
    for budget in (2**30, 2 * 20_000 * 60):
        for far in (0.0, 1e3):
            found = index_nearest(x + far, y + far, 1, budget_bytes=budget)
            assert found.indices[:50, 0].tolist() == list(range(100, 150))
            assert found.distances[:50].eq(0).all()
            assert found.indices[50:100, 0].tolist() == list(range(200, 250))
            assert found.recall > 0.97
    with pytest.raises(ValueError, match="budget_bytes is 1000000; an index of 20000 rows of 24 values needs at least 1280000"):
        index_nearest(x, y, 1, budget_bytes=1_000_000)


def test_a_row_is_not_its_own_neighbour_and_ties_go_to_the_lower_index(clustered: tuple[Tensor, Tensor]) -> None:
    y = clustered[1][:3000].clone()
    y[1000:1010] = y[0]  # duplicates, fewer than the spare candidates
    exact = k_nearest(y, y, 4, exclude_self=True)
    found = index_nearest(y, y, 4, exclude_self=True, probes=10_000, recall_queries=3000)
    assert found.recall == 1
    assert torch.equal(found.indices, exact.indices)
    assert torch.equal(found.distances, exact.distances)
    few = index_nearest(y[:5], y[:5], 4, exclude_self=True)
    assert torch.equal(few.indices, k_nearest(y[:5], y[:5], 4, exclude_self=True).indices)
    # Cells that hold fewer rows than are asked for: the rest comes from exact search.
    many = index_nearest(y[:40], y, 500, probes=1)
    assert torch.isfinite(many.distances).all()
    assert int(many.indices.min()) >= 0
    same = index_nearest(torch.ones(60, 3), torch.ones(200, 3), 2)
    assert same.distances.eq(0).all()
    assert same.recall == 1


def test_detectors_take_the_index_and_carry_its_recall(clustered: tuple[Tensor, Tensor]) -> None:
    x, y = clustered
    all_cells, one = partial(index_nearest, probes=10_000), partial(index_nearest, probes=1)
    for detect in (
        lambda search: memorization_ratio(x, y, search=search),
        lambda search: copy_similarity(x, y[:4000], 0.999, search=search),
        lambda search: carlini_ratio(x, y, 20, search=search),
        lambda search: authenticity(y[:4000], x, search=search),
    ):
        exact, by_index, lossy = detect(k_nearest), detect(all_cells), detect(one)
        assert (by_index.value, by_index.low, by_index.high) == (exact.value, exact.low, exact.high)
        assert torch.equal(by_index.nearest, exact.nearest)
        assert exact.recall == by_index.recall == 1
        assert lossy.recall < 1
    copies = memorization_ratio(x, y, search=one)
    assert copies.nearest[:50].tolist() == list(range(100, 150))  # a copy is in the cell of its original
    assert copies.scores[:50].eq(0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 6}, "k is 6; expected 1 to 5, the rows that can be neighbours"),
        ({"k": 5, "exclude_self": True}, "k is 5; expected 1 to 4"),
        ({"k": 1, "probes": 0}, "probes is 0; expected at least 1"),
        ({"k": 1, "recall_queries": 0}, "recall_queries is 0; expected at least 1"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, int], message: str) -> None:
    x = torch.arange(20.0).view(5, 4)
    with pytest.raises(ValueError, match=re.escape(message)):
        index_nearest(x, x, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="y has 2 dimensions where the other set has 4"):
        index_nearest(x, x[:, :2], 1)


def test_without_faiss_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=re.escape("search by index needs faiss: pip install 'mlflow-icr[faiss]'")):
        index_nearest(torch.ones(5, 2), torch.ones(5, 2), 1)

"""Nearest neighbours by a faiss index, for training sets of a million images and more, where exact search takes hours.

An inverted file proposes candidates: training rows lie in cells around k-means centres, and a query searches the `probes`
nearest cells. Candidates are measured and sorted as in `k_nearest`, by differences in float64, then by index, so distances are
exact and a copy is at distance 0. Neighbours in other cells are missed; the result's `recall` is the share that is not,
measured on some of the queries against exact search. This search is used only on request. Source: Johnson, Douze & Jegou
2019, "Billion-scale similarity search with GPUs"; Jegou, Douze & Schmid 2011 for the index.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlflow_icr.generation.embeddings import check_embeddings
from mlflow_icr.generation.neighbours import (
    BUDGET_BYTES,
    SPARE,
    Neighbours,
    around,
    central_row,
    k_nearest,
    measured,
    nearest_first,
)

# k-means needs 39 rows a centre, and gets no more.
ROWS_A_CELL = 40


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ValueError("search by index needs faiss: pip install 'mlflow-icr[faiss]'") from None
    return faiss


def _index(y: Tensor, centre: Tensor | None, budget: int) -> Any:
    """An inverted file of the rows of y: as float32 where they fit into half of the budget, else with a byte for each value."""
    faiss = _faiss()
    m, d = y.shape
    widths = {"float32": 4 * d + 8, "bytes": d + 8}  # a row's values, and its number
    kind = next((kind for kind, width in widths.items() if m * width <= budget // 2), None)
    if kind is None:
        raise ValueError(
            f"budget_bytes is {budget}; an index of {m} rows of {d} values needs at least {2 * m * widths['bytes']}"
        )
    # About 4 sqrt(M) cells balance the search for cells and the search in them; k-means has a quarter of the budget for rows.
    cells = max(1, min(int(4 * m**0.5), m // ROWS_A_CELL, budget // 4 // (4 * d) // ROWS_A_CELL))
    flat = faiss.IndexFlatL2(d)
    if kind == "float32":
        index = faiss.IndexIVFFlat(flat, d, cells, faiss.METRIC_L2)
    else:
        index = faiss.IndexIVFScalarQuantizer(flat, d, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2)
    index.cp.min_points_per_centroid = 1  # a set of a few rows is one cell; faiss's warning is not needed
    training_rows = torch.randperm(m, generator=torch.Generator().manual_seed(0))[: cells * ROWS_A_CELL]
    index.train(around(y[training_rows.to(y.device)], centre).cpu().numpy())
    for part in y.split(max(1, budget // 8 // (4 * d))):
        index.add(around(part, centre).cpu().numpy())
    return index


def _without(rows: Tensor, distances: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Both (B, k + 1) without the row itself, (B, k), or without the last one where duplicates have displaced the row."""
    drop = places == rows[:, None]
    drop[:, -1] |= ~drop.any(1)
    return distances[~drop].view(len(rows), -1), places[~drop].view(len(rows), -1)


def _exact(x: Tensor, y: Tensor, rows: Tensor, k: int, exclude_self: bool, budget: int) -> tuple[Tensor, Tensor]:
    """Distances and indices (B, k) of some rows of x, by exact search."""
    nearest = k_nearest(x[rows], y, k + exclude_self, budget_bytes=budget)
    return _without(rows, nearest.distances, nearest.indices) if exclude_self else (nearest.distances, nearest.indices)


def index_nearest(
    x: Tensor,
    y: Tensor,
    k: int,
    *,
    exclude_self: bool = False,
    budget_bytes: int = BUDGET_BYTES,
    probes: int = 32,
    recall_queries: int = 256,
    seed: int = 0,
) -> Neighbours:
    """The k nearest rows of y (M, D) to each row of x (N, D) among those that an index finds, with the `recall`.

    `recall` is the share of the k that are no farther than the k-th nearest by exact search, over `recall_queries` random rows
    of x. More `probes` find more and take longer; as many as there are cells find all. With `exclude_self` x and y are the same
    set. Detectors take it as `search=`; `functools.partial(index_nearest, probes=64)` sets the other arguments. Raises
    ValueError without faiss, when y has fewer rows to offer than k, and when `budget_bytes` is too small for the index.
    """
    x = check_embeddings("x", x, at_least=1)
    y = check_embeddings("y", y, at_least=1, like=x)
    for name, value in (("probes", probes), ("recall_queries", recall_queries)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    offered = y.shape[0] - exclude_self
    if not 1 <= k <= offered:
        raise ValueError(f"k is {k}; expected 1 to {offered}, the rows that can be neighbours")
    centre = central_row(y)
    index = _index(y, centre, budget_bytes)
    index.nprobe = min(probes, index.nlist)
    count = min(k + SPARE, offered) + exclude_self
    distances, indices = [], []
    for rows in torch.arange(len(x), device=x.device).split(max(1, budget_bytes // 8 // (8 * (y.shape[1] + count)))):
        part = x[rows]
        places = torch.from_numpy(index.search(around(part, centre).cpu().numpy(), count)[1]).to(x.device)
        near = places >= 0  # -1 stands for no more rows in the cells
        if exclude_self:
            near &= places != rows[:, None]
        squared, places = nearest_first(measured(part, y, places, near, budget_bytes), places, k)
        part_distances = squared.sqrt()
        short = torch.isinf(part_distances[:, -1])
        if bool(short.any()):
            part_distances[short], places[short] = _exact(x, y, rows[short], k, exclude_self, budget_bytes)
        distances.append(part_distances)
        indices.append(places)
    result = torch.cat(distances)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(x), generator=generator)[:recall_queries].to(x.device)
    farthest = _exact(x, y, sample, k, exclude_self, budget_bytes)[0][:, -1:]
    return Neighbours(result, torch.cat(indices), float((result[sample] <= farthest).double().mean()))

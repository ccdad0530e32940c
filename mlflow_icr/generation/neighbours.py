"""Exact nearest neighbours in bounded memory: float32 products find candidates, float64 differences decide.

A squared distance from a matrix product, |x|^2 - 2 x.y + |y|^2, costs little and is off by a rounding error that the norms
bound. So the product only proposes: the k + SPARE smallest are measured again as differences in float64, where an exact copy is
at distance 0, and sorted by distance, then index. A row whose k-th distance is not surely below all that was not proposed (as
when more than SPARE duplicates share it) is measured in full. The result is that of brute force in float64, ties included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SPARE = 8
BUDGET_BYTES = 2**30  # what a search may take beside its inputs


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Euclidean distances (N, k) float64, ascending, and indices (N, k) of the nearest rows; ties go to the lower index."""

    distances: Tensor
    indices: Tensor


def _exact(x: Tensor, y: Tensor, k: int, skip: Tensor | None, budget: int) -> tuple[Tensor, Tensor]:
    """Squared distances (N, k) and indices (N, k) by brute force in float64; `skip` (N,) is a row of y to leave out."""
    columns = max(1, budget // 4 // (8 * y.shape[1]))
    found = []
    for i, row in enumerate(x.double()):
        squared = torch.cat([(part.double() - row).square().sum(1) for part in y.split(columns)])
        if skip is not None:
            squared[skip[i]] = torch.inf
        order = squared.sort(stable=True)
        found.append((order.values[:k], order.indices[:k]))
    return torch.stack([values for values, _ in found]), torch.stack([indices for _, indices in found])


def _propose(x: Tensor, y: Tensor, centre: Tensor, count: int, skip: Tensor | None, columns: int) -> tuple[Tensor, Tensor]:
    """The `count` rows of y with the smallest approximate squared distances to each row of x, (B, count) each."""
    a = (x - centre).float()
    norms = a.square().sum(1, keepdim=True)
    best: Tensor | None = None
    places: Tensor | None = None
    for start in range(0, y.shape[0], columns):
        b = (y[start : start + columns] - centre).float()
        squared = torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(norms)
        if skip is not None:
            inside = (skip >= start) & (skip < start + b.shape[0])
            rows = inside.nonzero()[:, 0]
            squared[rows, skip[rows] - start] = torch.inf
        near = squared.topk(min(count, squared.shape[1]), dim=1, largest=False)
        values, indices = near.values, near.indices + start
        if best is not None and places is not None:
            values, indices = torch.cat([best, values], 1), torch.cat([places, indices], 1)
            order = values.topk(min(count, values.shape[1]), dim=1, largest=False).indices
            values, indices = values.gather(1, order), indices.gather(1, order)
        best, places = values, indices
    assert best is not None
    assert places is not None
    return best, places


def k_nearest(x: Tensor, y: Tensor, k: int, *, exclude_self: bool = False, budget_bytes: int = BUDGET_BYTES) -> Neighbours:
    """The k nearest rows of y (M, D) to each row of x (N, D), exactly, in at most `budget_bytes` beside the inputs.

    With `exclude_self` x and y are the same set, and a row is not its own neighbour (a duplicate of it is). Raises ValueError
    when y has fewer rows to offer than k.
    """
    offered = y.shape[0] - exclude_self
    if not 1 <= k <= offered:
        raise ValueError(f"k is {k}; expected 1 to {offered}, the rows that can be neighbours")
    d = y.shape[1]
    count = min(k + SPARE, offered)
    # Half of the budget for a block of y and the products with it, the rest for the candidates' differences in float64.
    columns = max(count + 1, min(y.shape[0], budget_bytes // 4 // (4 * d)))
    rows = max(1, min(x.shape[0], budget_bytes // 4 // (4 * columns), budget_bytes // 4 // (4 * d)))
    centre = y.mean(0, dtype=torch.float64).to(y.dtype)  # far from the origin, norms would drown the differences
    widest = max(float((part - centre).square().sum(1).max()) for part in y.split(columns)) ** 0.5
    distances, indices = [], []
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows]
        skip = torch.arange(start, start + len(part), device=x.device) if exclude_self else None
        approximate, places = _propose(part, y, centre, count, skip, columns)
        squared = _measure(part, y, places, budget_bytes)
        # By distance, then by index: a stable sort of what is already in the order of indices.
        by_index = torch.sort(places, dim=1)
        order = torch.sort(squared.gather(1, by_index.indices), stable=True, dim=1)
        squared, places = order.values[:, :k], by_index.values.gather(1, order.indices)[:, :k]
        if count < offered:
            # A float32 sum of D products is off by at most D eps times the sum of their sizes (Higham 2002, section 3.1),
            # here twice |x| |y| and the norms; rounding the centred values adds as much again.
            sizes = (part - centre).double().square().sum(1).sqrt() + widest
            margin = 2 * (d + 4) * torch.finfo(torch.float32).eps * sizes.square()
            doubtful = approximate.max(1).values.double() - margin <= squared[:, -1]
            if bool(doubtful.any()):
                mine = None if skip is None else skip[doubtful]
                squared[doubtful], places[doubtful] = _exact(part[doubtful], y, k, mine, budget_bytes)
        distances.append(squared.sqrt())
        indices.append(places)
    return Neighbours(torch.cat(distances), torch.cat(indices))


def _measure(x: Tensor, y: Tensor, places: Tensor, budget: int) -> Tensor:
    """Squared distances from rows of x (B, D) to their candidates in y, (B, count), by differences in float64."""
    step = max(1, budget // 4 // (16 * places.shape[1] * y.shape[1]))
    parts = [
        (y[some].double() - row[:, None].double()).square_().sum(-1)
        for row, some in zip(x.split(step), places.split(step), strict=True)
    ]
    return torch.cat(parts)

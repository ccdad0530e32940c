"""Exact nearest neighbours in bounded memory: float32 products find candidates, float64 differences decide.

A squared distance from a matrix product, |x|^2 - 2 x.y + |y|^2, costs little and is off by a rounding error that the norms
bound. So the product only proposes the k + SPARE smallest. Those that might be among the k nearest are measured again as
differences in float64, where an exact copy is at distance 0, and sorted by distance, then index. A query is measured in full
where a row that was not proposed might be as near (as when more than SPARE duplicates share a distance). The result is that of
brute force in float64, ties included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SPARE = 24
CENTRE_ROWS = 256  # rows whose mean is the centre; of images of 256x256 these take 200 MB
# A centre nearer to the origin than this many times the rows' own spread is not worth a copy of them all.
FAR = 2.0
BUDGET_BYTES = 2**30  # what a search may take beside its inputs
CACHED_BYTES = 2**22  # of differences at a time: within a processor's cache this is several times faster


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Euclidean distances (N, k) float64, ascending, and indices (N, k) of the nearest rows; ties go to the lower index.

    `recall` is the share of the true neighbours that are among them: 1 for exact search.
    """

    distances: Tensor
    indices: Tensor
    recall: float = 1.0


class Search(Protocol):
    """A search for neighbours that detectors can be given: `k_nearest` or `mlflow_icr.generation.index.index_nearest`."""

    def __call__(self, x: Tensor, y: Tensor, k: int, *, exclude_self: bool = ..., budget_bytes: int = ...) -> Neighbours:
        """The k nearest rows of y to each row of x."""


def _exact(x: Tensor, y: Tensor, k: int, skip: Tensor | None, budget: int) -> tuple[Tensor, Tensor]:
    """Squared distances (N, k) and indices (N, k) by brute force in float64; `skip` (N,) is a row of y to leave out."""
    columns = max(1, budget // 4 // (8 * y.shape[1]))
    nearest = []
    for i, row in enumerate(x.double()):
        squared = torch.cat([(part.double() - row).square().sum(1) for part in y.split(columns)])
        if skip is not None:
            squared[skip[i]] = torch.inf
        order = squared.sort(stable=True)
        nearest.append((order.values[:k], order.indices[:k]))
    return torch.stack([values for values, _ in nearest]), torch.stack([indices for _, indices in nearest])


def central_row(y: Tensor) -> Tensor | None:
    """The centre of the rows (D,) if norms around the origin would drown their differences in rounding; else None."""
    sample = y[:: max(1, -(-y.shape[0] // CENTRE_ROWS))]
    sample = sample if sample.is_floating_point() else sample.float()
    centre = sample.mean(0)
    far = float(centre.square().sum()) > FAR**2 * float((sample - centre).square().sum(1).mean())
    return centre if far else None


def around(x: Tensor, centre: Tensor | None) -> Tensor:
    """Rows less the centre (B, D), as float32."""
    return (x if centre is None else x - centre).float()


def _coarseness() -> float:
    """By how much a product's operands may be rounded beyond float32: TF32 or bfloat16, where settings allow it."""
    try:
        coarse = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set for one backend alone
        coarse = True
    return 2.0**-8 if coarse else 0.0


def _squared_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1).square()


def _propose(
    x: Tensor, y: Tensor, centre: Tensor | None, count: int, skip: Tensor | None, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` rows of y with the smallest approximate squared distances to each row of x, (B, count) each, ascending.

    Also returns a bound on the error of these distances, (B, 1).
    """
    a = around(x, centre)
    norms = _squared_norms(a)[:, None]
    widest = 0.0
    best: Tensor | None = None
    places: Tensor | None = None
    for start in range(0, y.shape[0], columns):
        b = around(y[start : start + columns], centre)
        sizes = _squared_norms(b)
        widest = max(widest, float(sizes.max()))
        squared = torch.addmm(sizes, a, b.T, alpha=-2)  # less |x|^2, which changes no order
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
    # A float32 sum of D products is off by at most D eps / 2 times the sum of their sizes (Higham 2002, section 3.1), which for
    # 2 x.y and both norms is (|x| + |y|)^2; what remains is rounding of single values, a few eps.
    # Operands that are rounded first, by a share u each, add at most 4 u |x| |y|.
    relative = (x.shape[1] / 2 + 8) * torch.finfo(torch.float32).eps + _coarseness()
    margin = relative * (norms.double().sqrt() + widest**0.5).square()
    return best + norms, places, margin


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
    centre = central_row(y)
    distances, indices = [], []
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows]
        skip = torch.arange(start, start + len(part), device=x.device) if exclude_self else None
        with torch.autocast(x.device.type, enabled=False):  # a training around it may use half precision
            approximate, places, margin = _propose(part, y, centre, count, skip, columns)
        # The true k nearest are at most two error bounds above the k-th approximate distance.
        near = approximate.double() <= approximate[:, k - 1 : k].double() + 2 * margin
        squared = measured(part, y, places, near, budget_bytes)
        squared, places = nearest_first(squared, places, k)
        if count < offered:
            uncertain = approximate[:, -1].double() - margin[:, 0] <= squared[:, -1]
            if bool(uncertain.any()):
                skipped = None if skip is None else skip[uncertain]
                squared[uncertain], places[uncertain] = _exact(part[uncertain], y, k, skipped, budget_bytes)
        distances.append(squared.sqrt())
        indices.append(places)
    return Neighbours(torch.cat(distances), torch.cat(indices))


def measured(x: Tensor, y: Tensor, places: Tensor, near: Tensor, budget: int) -> Tensor:
    """Squared distances (B, count) from rows of x to their candidates in y, by differences in float64; inf where not `near`."""
    squared = torch.full(places.shape, torch.inf, dtype=torch.float64, device=x.device)
    rows, columns = near.nonzero(as_tuple=True)
    step = max(1, min(budget // 4, CACHED_BYTES) // (16 * y.shape[1]))
    parts = [
        (y[places[row, column]].double() - x[row].double()).square_().sum(1)
        for row, column in zip(rows.split(step), columns.split(step), strict=True)
    ]
    squared[rows, columns] = torch.cat(parts)
    return squared


def nearest_first(squared: Tensor, places: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k of both (B, count), by distance, then by index."""
    # A stable sort of what is already in the order of indices.
    by_index = torch.sort(places, dim=1)
    order = torch.sort(squared.gather(1, by_index.indices), stable=True, dim=1)
    return order.values[:, :k], by_index.values.gather(1, order.indices)[:, :k]

"""Near-duplicates in a set: all pairs of rows within a radius, exactly, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlflow_icr.generation.embeddings import check_embeddings
from mlflow_icr.generation.neighbours import k_nearest

# A share of the distance of two rows by chance. In pixels, JPEG at quality 75 moves a photograph by 0.03 to 0.08 of it, and
# different digits are at least a third of it apart.
THRESHOLD = 0.15
SCALE_PAIRS = 4096  # enough pairs for their median distance to about 2 %
FIRST_NEIGHBOURS = 8


@dataclass(frozen=True, eq=False)
class NearDuplicates:
    """Pairs (P, 2) of rows i < j, ascending, and their distances (P,), in units of `scale`, that of two rows by chance."""

    pairs: Tensor
    distances: Tensor
    scale: float

    def groups(self, count: int) -> list[list[int]]:
        """Rows that are connected by pairs, of `count` rows in all: largest groups first, then by the first row."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        i, j = self.pairs.T.numpy()
        graph = coo_array((torch.ones(len(i)).numpy(), (i, j)), shape=(count, count))
        _, member = connected_components(graph, directed=False)
        parts: dict[int, list[int]] = {}
        for row, group in enumerate(member.tolist()):
            parts.setdefault(group, []).append(row)
        return sorted((part for part in parts.values() if len(part) > 1), key=lambda part: (-len(part), part[0]))


def chance_distance(x: Tensor, seed: int = 0) -> float:
    """The median distance of two different rows of x (N, D), of pairs that the seed draws."""
    generator = torch.Generator().manual_seed(seed)
    i = torch.randint(len(x), (SCALE_PAIRS,), generator=generator)
    j = (i + torch.randint(1, len(x), (SCALE_PAIRS,), generator=generator)) % len(x)
    distances = [
        (x[a].double() - x[b].double()).square().sum(1).sqrt() for a, b in zip(i.split(256), j.split(256), strict=True)
    ]
    return float(torch.cat(distances).median())


def near_duplicates(x: Tensor, threshold: float = THRESHOLD, seed: int = 0) -> NearDuplicates:
    """All pairs of rows of x (N, D) whose distance is at most `threshold` times that of two rows by chance.

    Raises ValueError for a threshold outside [0, 1), for fewer than 2 rows, and for a set whose rows are mostly the same.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is {threshold}; expected a number in [0, 1)")
    x = check_embeddings("x", x, at_least=2)
    scale = chance_distance(x, seed)
    if scale == 0:
        raise ValueError("two images by chance are the same; expected a set that is not mostly copies of one")
    radius = threshold * scale
    rows, count, blocks = torch.arange(len(x)), min(FIRST_NEIGHBOURS, len(x)), list[tuple[Tensor, Tensor, Tensor]]()
    while len(rows):
        near = k_nearest(x[rows], x, count)
        done = (near.distances[:, -1] > radius) | (count == len(x))
        inside = (near.distances <= radius) & done[:, None]
        blocks.append((rows[inside.nonzero()[:, 0]], near.indices[inside], near.distances[inside]))
        rows, count = rows[~done], min(4 * count, len(x))  # these rows may have further neighbours within the radius
    i, j, distances = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    ahead = i < j  # each pair was found from both ends, and a row is its own neighbour
    i, j, distances = i[ahead], j[ahead], distances[ahead]
    order = torch.argsort(i * len(x) + j)
    return NearDuplicates(torch.stack([i, j], 1)[order], distances[order] / scale, scale)

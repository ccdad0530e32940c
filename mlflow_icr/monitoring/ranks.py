"""Share work among the ranks of torch.distributed, if there are any."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) outside torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(number: int, device: torch.device) -> int:
    """The sum of each rank's number, the same on all of them."""
    if world()[1] == 1:
        return number
    total = torch.tensor(number, device=device)
    dist.all_reduce(total)
    return int(total)


def gather_rows(local_rows: Tensor, total: int) -> Tensor:
    """All `total` rows on every rank, in order, where rank r of W holds rows r, r + W, r + 2W, ..."""
    _, ranks = world()
    if ranks == 1:
        return local_rows
    each = -(-total // ranks)
    padded = local_rows.new_zeros(each, *local_rows.shape[1:])
    padded[: len(local_rows)] = local_rows
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:total]  # the padded tail is the end of the interleaved order

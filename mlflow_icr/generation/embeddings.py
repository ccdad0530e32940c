"""The border of this floor: what counts as a set of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def check_embeddings(name: str, x: Tensor, *, at_least: int, like: Tensor | None = None) -> Tensor:
    """`x` as finite float64 embeddings (N, D), N >= at_least, of the same D and on the same device as `like`.

    Raises ValueError naming the argument, what it is and what is allowed.
    """
    if x.ndim != 2 or x.shape[1] < 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (N, D)")
    if like is not None and x.shape[1] != like.shape[1]:
        raise ValueError(f"{name} has {x.shape[1]} dimensions where the other set has {like.shape[1]}; expected the same")
    if x.shape[0] < at_least:
        raise ValueError(f"{name} has {x.shape[0]} rows; expected at least {at_least}")
    x = x.detach().to(torch.float64) if like is None else x.detach().to(like.device, torch.float64)
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} holds NaN or Inf; expected finite values")
    return x

"""The check of embeddings, at the entry of each function of this package."""

from __future__ import annotations

import torch
from torch import Tensor


def check_embeddings(name: str, x: Tensor, *, at_least: int, like: Tensor | None = None) -> Tensor:
    """`x` as finite embeddings (N, D), N >= at_least, of the same D and on the same device as `like`.

    Half precision becomes float32; float32 stays, since neighbours are searched in it and measured in float64. Pixels in 8 bits
    stay too: a search converts them block by block, for as floats they take four times the memory. Raises ValueError naming the
    argument, its value and what is allowed.
    """
    if x.ndim != 2 or x.shape[1] < 1:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected (N, D)")
    if like is not None and x.shape[1] != like.shape[1]:
        raise ValueError(f"{name} has {x.shape[1]} dimensions where the other set has {like.shape[1]}; expected the same")
    if x.shape[0] < at_least:
        raise ValueError(f"{name} has {x.shape[0]} rows; expected at least {at_least}")
    x = x.detach().to(x.device if like is None else like.device)
    if x.dtype == torch.uint8:
        return x
    x = x if x.dtype in (torch.float32, torch.float64) else x.float() if x.is_floating_point() else x.double()
    # A finite sum has finite terms, and is cheaper to check; an infinite one may only have overflowed.
    if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} holds NaN or Inf; expected finite values")
    return x

"""Bootstrap intervals of means over images, the same for the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor

FOLDS = 1000
LEVEL = 0.95
BLOCK = 2**22  # resampled numbers held at a time


def bootstrap_interval(values: Tensor, *, folds: int = FOLDS, level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of the mean of values (N,) over `folds` resamplings with replacement (Efron 1979)."""
    x = values.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    n = len(x)
    step = max(1, BLOCK // n)
    means = [x[torch.randint(n, (min(step, folds - start), n), generator=generator)].mean(1) for start in range(0, folds, step)]
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), tail).tolist()
    return low, high

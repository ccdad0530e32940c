"""The optimal denoiser of a training set, in closed form: a network that has only memorized its images gives the same.

For images y_i and noise of standard deviation sigma the smallest expected squared error has

    D*(x, sigma) = sum_i w_i y_i,   w = softmax_i(-|x - y_i|^2 / (2 sigma^2))

(Karras et al. 2022, appendix B.3). Its samples are copies. A network that has learned more than its images differs from it
wherever sampling goes; one that copies does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 2**22  # float64 numbers of the training set that are held at a time, 32 MiB


def optimal_denoiser(x: Tensor, sigma: float, train: Tensor, *, leave_out: Tensor | None = None) -> Tensor:
    """D*(x, sigma) of noised images x (B, D) for the training set `train` (N, D), (B, D) float64, in bounded memory.

    `train` is in the units of x, or uint8, which stands for -1 to 1. `leave_out` (B,) are the rows of `train` that x came from,
    which D* then excludes. Raises ValueError for other shapes, a sigma that is not positive, and where no rows remain.
    """
    if x.ndim != 2 or train.ndim != 2 or x.shape[1] != train.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, train {tuple(train.shape)}; expected (B, D) and (N, D)")
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}; expected a positive number")
    if len(train) < (1 if leave_out is None else 2):
        raise ValueError(f"train has {len(train)} image(s); expected at least {1 if leave_out is None else 2}")
    x = x.cpu().double()
    largest = torch.full((len(x), 1), -torch.inf, dtype=torch.float64)
    total, weighted = torch.zeros(len(x), 1, dtype=torch.float64), torch.zeros_like(x)
    start = 0
    for part in train.split(max(1, ROWS // train.shape[1])):
        y = part.cpu().double()
        y = y / 127.5 - 1 if part.dtype == torch.uint8 else y
        # |x|^2 is the same for all y and changes no weight.
        scores = (x @ y.T - y.square().sum(1) / 2) / sigma**2  # (B, n)
        if leave_out is not None:
            inside = (leave_out >= start) & (leave_out < start + len(y))
            scores[inside, leave_out[inside] - start] = -torch.inf
        peak = torch.maximum(largest, scores.amax(1, keepdim=True))
        # A part in which every row is left out gets weight 0; exp(-inf - -inf) would be NaN.
        scale = (largest - peak).nan_to_num(nan=0.0).exp()
        weights = (scores - peak).nan_to_num(nan=-torch.inf).exp()
        total, weighted, largest = total * scale + weights.sum(1, keepdim=True), weighted * scale + weights @ y, peak
        start += len(y)
    return weighted / total


def distances_from_optimal(
    denoised: Tensor, x: Tensor, sigma: float, train: Tensor, *, leave_out: Tensor | None = None
) -> Tensor:
    """Root mean square distances (B,) float64 of a network's output for x, `denoised` (B, D), from D*(x, sigma).

    Raises ValueError as `optimal_denoiser` does.
    """
    best = optimal_denoiser(x, sigma, train, leave_out=leave_out)
    return (denoised.cpu().double() - best).square().mean(1).sqrt()

"""Samplers: from noise to images through a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mlflow_icr.extraction.denoisers import Denoiser, decoder_of
from mlflow_icr.extraction.keyed import keyed_generator


def starting_noise(indices: Sequence[int], shape: Sequence[int], seed: int) -> Tensor:
    """Unit noise (B, *shape) that samples with these indices start from, whatever the batch, rank or device."""
    noise = [keyed_generator("sample", seed, i).standard_normal(tuple(shape), dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(noise))


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """EDM's noise levels from sigma_max down to sigma_min, then 0: num_steps + 1 numbers (Karras et al. 2022, eq. 5)."""
    if num_steps < 2:
        raise ValueError(f"num_steps is {num_steps}; expected at least 2")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}; expected 0 < sigma_min < sigma_max")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [(high + i / (num_steps - 1) * (low - high)) ** rho for i in range(num_steps)] + [0.0]


@torch.no_grad()
def heun_sample(
    denoiser: Denoiser,
    noise: Tensor,
    *,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    labels: Tensor | None = None,
    watch: Callable[[float, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Images (B, C, H, W), about in [-1, 1], by EDM's deterministic second-order sampler from unit noise of that shape.

    Costs 2 num_steps - 1 calls of the denoiser, with `labels` (B,) where they are given. `watch(sigma, x, D(x))` is called
    at every noise level. Raises ValueError for an impossible schedule.
    Source: Karras et al. 2022, algorithm 1; the defaults are its CIFAR-10 settings.
    """
    sigmas = karras_sigmas(num_steps, sigma_min, sigma_max, rho)
    conditions = {} if labels is None else {"labels": labels}
    x = noise.to(torch.float32) * sigmas[0]
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoiser(x, sigma, **conditions)
        if watch is not None:
            watch(sigma, x, denoised)
        slope = (x - denoised) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope_next = (x_next - denoiser(x_next, sigma_next, **conditions)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
    return x


def sample(denoiser: Denoiser, noise: Tensor, *, num_steps: int, labels: Tensor | None = None) -> Tensor:
    """Images (B, C, H, W), about in [-1, 1], from unit noise of the shape that the denoiser works on.

    A denoiser's own `sample` is used where it has one, else EDM's sampler; latents are decoded. `labels` (B,) go to a
    class-conditional denoiser, which samples unconditionally without them.
    """
    own_sampler, decode = getattr(denoiser, "sample", None), decoder_of(denoiser)
    if own_sampler is None:
        x = heun_sample(denoiser, noise, num_steps=num_steps, labels=labels)
    else:
        x = own_sampler(noise, num_steps=num_steps, labels=labels)
    return x if decode is None else decode(x)

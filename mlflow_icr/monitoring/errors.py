"""Denoising errors of the probe images and of their views, on the same noise at every step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mlflow_icr.extraction.denoisers import Denoiser, device_of, encoder_of, evaluating
from mlflow_icr.extraction.keyed import keyed_generator
from mlflow_icr.extraction.views import as_unit_interval, make_views
from mlflow_icr.monitoring.protocol import Protocol
from mlflow_icr.monitoring.ranks import gather_rows, world

# Whole forward passes are dearer than those that end at the layer: this many of images and of views at a measurement make
# the ratio's standard error a few per cent, where a turn multiplies it.
ERROR_IMAGES = 256


class ErrorReader:
    """Mean squared errors of denoising `images` (N, C, H, W) and their views; `protocol` is resolved.

    The first 256 images are used; of fewer, several views each, so that about 256 errors are averaged. For a denoiser of
    latents, which errors are of then, images and views are encoded once and kept.
    """

    def __init__(self, images: Tensor, protocol: Protocol, batch_size: int) -> None:
        self.images, self.protocol, self.batch_size = images[:ERROR_IMAGES], protocol, batch_size
        self._encoded: dict[int, Tensor] = {}  # by the first image of a batch

    @property
    def draws(self) -> int:
        """J, views of an image."""
        return -(-ERROR_IMAGES // len(self.images))

    def _clean(self, indices: list[int], device: torch.device, encode: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Images and views (B, 2 J, C, H, W), J times each."""
        if indices[0] in self._encoded:
            return self._encoded[indices[0]]
        images, p, j = self.images[indices], self.protocol, self.draws
        views = make_views(
            images, indices, num_views=j, sigma=0, seed=p.seed, level=p.augmentation_level, device=device, encode=encode
        )  # (B, J, C, H, W)
        own = as_unit_interval(images).to(device) * 2 - 1
        own = own if encode is None else encode(own)
        clean = torch.cat([own[:, None].expand_as(views), views], 1)
        if encode is not None:
            self._encoded[indices[0]] = clean
        return clean

    def _noise(self, indices: list[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Unit noise (B, *shape)."""
        streams = [keyed_generator("error", self.protocol.seed, i) for i in indices]
        return torch.from_numpy(np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams])).to(device)

    @torch.no_grad()
    def read(self, denoiser: Denoiser, sigma: float) -> tuple[Tensor, Tensor]:
        """Mean squared errors of each image and of its views, (N,) float64 each, of all ranks, at noise sigma."""
        device = device_of(denoiser)
        rank, ranks = world()
        mine = list(range(rank, len(self.images), ranks))
        step = max(1, self.batch_size // (2 * self.draws))
        parts = []
        with evaluating(denoiser.network):
            for start in range(0, len(mine), step):
                some = mine[start : start + step]
                clean = self._clean(some, device, encoder_of(denoiser))
                noise, x = self._noise(some, tuple(clean.shape[1:]), device), clean.flatten(0, 1)
                noisy = (x + sigma * noise.flatten(0, 1)).split(self.batch_size)
                found = torch.cat([denoiser(part, sigma) for part in noisy])
                error = (found - x).double().square().flatten(1).mean(1)
                parts.append(error.view(-1, 2, self.draws).mean(2))  # (B, 2)
        errors = torch.cat(parts) if parts else torch.empty(0, 2, dtype=torch.float64, device=device)
        errors = gather_rows(errors, len(self.images))
        return errors[:, 0], errors[:, 1]

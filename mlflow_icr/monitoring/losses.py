"""The loss monitor: how well a denoiser does on its training images and on held-out ones, on the same noise at every step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mlflow_icr.extraction.denoisers import Denoiser, device_of, encoder_of, evaluating
from mlflow_icr.extraction.fitting import FittingBatches, host_batch
from mlflow_icr.extraction.keyed import keyed_generator
from mlflow_icr.extraction.views import as_unit_interval
from mlflow_icr.monitoring.report import Report

# The mean loss of images (B, C, H, W) in [-1, 1] or latents, at noise levels (B,) of the trainer's own kind, with unit noise.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
KEYS = ("loss/train_eval", "loss/heldout", "loss/gap")


class LossMonitor:
    """Evaluates a loss without training on it: `loss/train_eval`, `loss/heldout`, and their difference `loss/gap`.

    `loss(images, sigma, noise)` is the trainer's own loss of `denoiser`; `draw(generator, count)` gives `count` noise levels.
    For a denoiser of latents, images are encoded. `train` and `heldout` are (N, C, H, W), uint8 or floats in [0, 1]; up to
    `num_images` of each are used, with `draws` noises each. Noise level and noise i are the same for both sets and at every
    step. Every rank computes the whole, `batch_size` images at a time, or as many as fit the memory.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        loss: Loss,
        draw: Callable[[np.random.Generator, int], Tensor],
        train: Tensor,
        heldout: Tensor,
        *,
        num_images: int = 256,
        draws: int = 4,
        seed: int = 0,
        batch_size: int = 512,
    ) -> None:
        if num_images < 1 or draws < 1:
            raise ValueError(f"num_images is {num_images} and draws {draws}; expected at least 1")
        self.denoiser, self.loss = denoiser, loss
        count = min(num_images, len(train), len(heldout))
        self.sets = {
            "loss/train_eval": self._clean(train[:count]).repeat(draws, 1, 1, 1),
            "loss/heldout": self._clean(heldout[:count]).repeat(draws, 1, 1, 1),
        }
        shape = (count * draws, *self.sets["loss/heldout"].shape[1:])
        generator = keyed_generator("loss", seed)
        self.batches = FittingBatches(host_batch(denoiser, self.sets["loss/heldout"][:1], batch_size))
        self.sigma = draw(generator, count * draws)
        self.noise = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

    def _clean(self, images: Tensor) -> Tensor:
        encode, clean = encoder_of(self.denoiser), as_unit_interval(images) * 2 - 1
        return clean if encode is None else encode(clean.to(device_of(self.denoiser))).cpu()

    @torch.no_grad()
    def measure(self, step: int) -> Report:
        """The report at `step` images seen; weights and training flags stay as they are."""
        values = {}
        device = device_of(self.denoiser)
        with evaluating(self.denoiser.network):
            for key, images in self.sets.items():

                def sum_of(rows: slice, images: Tensor = images) -> float:
                    part = images[rows].to(device)
                    return float(self.loss(part, self.sigma[rows].to(device), self.noise[rows].to(device))) * len(part)

                values[key] = sum(self.batches.over(len(images), sum_of)) / len(images)
        if not all(np.isfinite(value) for value in values.values()):
            return Report(step, {}, absent=dict.fromkeys(KEYS, "the loss is not finite"))
        values["loss/gap"] = values["loss/heldout"] - values["loss/train_eval"]
        return Report(step, values)

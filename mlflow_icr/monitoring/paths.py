"""How far a network is from the training set's optimal denoiser, along the sampler's path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlflow_icr.extraction.denoisers import Denoiser, device_of, encoder_of, evaluating
from mlflow_icr.extraction.keyed import keyed_generator
from mlflow_icr.extraction.samplers import heun_sample, starting_noise
from mlflow_icr.extraction.views import as_unit_interval
from mlflow_icr.generation.empirical import distances_from_optimal
from mlflow_icr.monitoring.ranks import gather_rows

TRAJECTORIES = 64
LEVELS = 8
POOLED_SIGMA = 2.0  # levels from here down are pooled: above, every denoiser is near the mean of all images
MOST_VALUES = 2**28  # of the training set: with more, 64 trajectories would take minutes on a processor
# Above these levels D* is the mean of the training set, and below them one image, whatever the network does.
SMALLEST_SIGMA, LARGEST_SIGMA = 0.1, 10.0


@dataclass(frozen=True, eq=False)
class Path:
    """A network's inputs and outputs along its trajectories: noise levels, and x and D(x) (T, B, C, H, W) at each."""

    sigmas: tuple[float, ...]
    x: Tensor
    denoised: Tensor


def sampled_path(denoiser: Denoiser, noise: Tensor, num_steps: int, labels: Tensor | None = None) -> tuple[Tensor, Path]:
    """Samples of EDM's sampler from unit noise (B, C, H, W), and the path to them at up to 8 noise levels from 10 to 0.1.

    Networks that predict noise or velocity are sampled so too: their probability flow is the same, in other variables. The path
    is empty if no noise level of the sampler lies between.
    """
    states: list[tuple[float, Tensor, Tensor]] = []

    def watch(sigma: float, x: Tensor, denoised: Tensor) -> None:
        if SMALLEST_SIGMA <= sigma <= LARGEST_SIGMA:
            states.append((sigma, x.cpu(), denoised.cpu()))

    images = heun_sample(denoiser, noise, num_steps=num_steps, labels=labels, watch=watch)
    places = np.unique(np.linspace(0, len(states) - 1, min(LEVELS, len(states))).round().astype(int))
    selected = [states[place] for place in places]
    none = torch.empty(0, *noise.shape)
    x, denoised = (torch.stack([row[place] for row in selected]) if selected else none for place in (1, 2))
    return images, Path(tuple(sigma for sigma, _, _ in selected), x, denoised)


def joined_path(parts: Sequence[Path], total: int, device: torch.device) -> Path:
    """One path of `total` trajectories, joined from the parts of them that this rank and the other ranks have.

    `device` is where ranks exchange tensors.
    """
    x, denoised = (torch.cat([getattr(part, name) for part in parts], 1).transpose(0, 1) for name in ("x", "denoised"))
    both = gather_rows(torch.stack([x, denoised], 1).to(device), total).cpu()
    return Path(parts[0].sigmas, both[:, 0].transpose(0, 1), both[:, 1].transpose(0, 1))


class PathReader:
    """Distances of D from D* along trajectories, relative to those of fresh images from D* of these images with noise.

    `train` (N, C, H, W) is the whole training set, uint8 or floats in [0, 1]. Fresh images are `heldout` ones (M, C, H, W), or
    training images, each left out of D*, which is equivalent. 0 is a network that knows nothing but its images; one that draws
    images of its own is about as far from D* as fresh images are. Only denoisers of images have these distances.
    """

    def __init__(self, train: Tensor, heldout: Tensor | None, seed: int, num_steps: int) -> None:
        self.train = (train if train.dtype == torch.uint8 else as_unit_interval(train) * 2 - 1).flatten(1)
        self.leave_out = heldout is None
        self.fresh = (train if heldout is None else heldout)[:TRAJECTORIES]
        self.seed, self.num_steps = seed, num_steps
        self._far: dict[float, float] = {}  # by noise level, of fresh images

    def _of_fresh(self, sigma: float) -> float:
        """The root mean square distance of fresh images from D* of these images with noise."""
        if sigma not in self._far:
            clean = (as_unit_interval(self.fresh) * 2 - 1).flatten(1)
            streams = [keyed_generator("path-fresh", self.seed, i) for i in range(len(clean))]
            noise = torch.from_numpy(np.stack([s.standard_normal(clean.shape[1], dtype=np.float32) for s in streams]))
            own = torch.arange(len(clean)) if self.leave_out else None
            distances = distances_from_optimal(clean, clean + sigma * noise, sigma, self.train, leave_out=own)
            self._far[sigma] = float(distances.square().mean().sqrt())
        return self._far[sigma]

    def why_not(self, denoiser: Denoiser) -> str | None:
        """Why there are no distances for a denoiser and this training set, or None."""
        if encoder_of(denoiser) is not None:
            return "the denoiser works on latents; the optimal denoiser is that of images"
        if self.train.numel() > MOST_VALUES:
            return f"the training set has {self.train.numel()} values; its optimal denoiser is computed up to {MOST_VALUES}"
        return None

    @torch.no_grad()
    def read(
        self, denoiser: Denoiser, labels: Tensor | None = None, *, path: Path | None = None
    ) -> tuple[tuple[float, ...], Tensor]:
        """Noise levels, and relative distances (levels, trajectories). Raises ValueError where there is no such distance.

        `path` is that of the first 64 samples, which are drawn unless it is given.
        """
        if why := self.why_not(denoiser):
            raise ValueError(why)
        path = self._trajectories(denoiser, labels) if path is None else path
        if not path.sigmas:
            raise ValueError(f"num_steps is {self.num_steps}; no noise level of the sampler lies between 0.1 and 10")
        rows = [
            distances_from_optimal(denoised.flatten(1), x.flatten(1), sigma, self.train) / self._of_fresh(sigma)
            for sigma, x, denoised in zip(path.sigmas, path.x, path.denoised, strict=True)
        ]
        distances = torch.stack(rows)
        if not bool(distances.isfinite().all()):
            raise ValueError("distances from the optimal denoiser are not finite")
        return path.sigmas, distances

    def _trajectories(self, denoiser: Denoiser, labels: Tensor | None) -> Path:
        """The paths of the first 64 samples."""
        shape = tuple(self.fresh.shape[1:])
        noise = starting_noise(range(TRAJECTORIES), shape, self.seed).to(device_of(denoiser))
        sample_labels = None if labels is None else labels[torch.arange(TRAJECTORIES) % len(labels)].to(noise.device)
        with evaluating(denoiser.network):
            return sampled_path(denoiser, noise, self.num_steps, sample_labels)[1]

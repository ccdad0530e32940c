"""What the network is trained on: images, or latents that are encoded once and kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlflow_icr.extraction.files import cache_folder
from mlflow_icr.extraction.latents import Autoencoder, LatentCache, encode_images, load_autoencoder
from mlflow_icr.monitoring.ranks import gather_rows, sum_over_ranks, world
from trainers.augmentation import FLIP
from trainers.config import TrainConfig
from trainers.data import DataSet


@dataclass(frozen=True, eq=False)
class Inputs:
    """Images (N, C, H, W) uint8, or mean and deviation of latents, (N, 2 C, H, W) float32; and classes (N,).

    Of latents that are trained on with mirror images, `mirrored` has those of the mirror images.
    """

    images: Tensor
    labels: Tensor | None = None
    mirrored: Tensor | None = None

    @property
    def latent(self) -> bool:
        """Whether they are latents."""
        return self.images.is_floating_point()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W), of what the network is given."""
        channels, height, width = self.images.shape[1:]
        return channels // (2 if self.latent else 1), height, width

    def to(self, device: torch.device) -> Inputs:
        """The same with images on a device; classes stay on the CPU, where batches are drawn."""
        labels = None if self.labels is None else self.labels.cpu()
        return Inputs(self.images.to(device), labels, None if self.mirrored is None else self.mirrored.to(device))


def open_autoencoder(config: TrainConfig, device: torch.device) -> Autoencoder | None:
    """The autoencoder of a configuration on a device, None for pixels.

    Raises ValueError where there is none, or latents do not fit the network.
    """
    if not config.network.autoencoder:
        return None
    autoencoder = load_autoencoder(config.network.autoencoder)
    if config.data.resolution % autoencoder.factor:
        raise ValueError(
            f"resolution is {config.data.resolution}; expected a multiple of {autoencoder.factor}, of which the autoencoder "
            f"{config.network.autoencoder!r} makes one"
        )
    config.check_network(config.data.resolution // autoencoder.factor)
    autoencoder.network.to(device)
    return autoencoder


def _moments(autoencoder: Autoencoder, images: Tensor, device: torch.device) -> Tensor:
    """Latents of images that every rank has: read where every rank finds them, else each encodes a share, and one keeps all."""
    cache = LatentCache(cache_folder())
    found = cache.find(autoencoder, images)
    rank, ranks = world()
    if sum_over_ranks(int(found is not None), device) == ranks and found is not None:
        return found
    made = gather_rows(encode_images(autoencoder, images[rank::ranks], device).to(device), len(images)).cpu()
    if rank == 0:
        cache.keep(autoencoder, images, made)
    return made


def inputs_of(config: TrainConfig, data: DataSet, autoencoder: Autoencoder | None, device: torch.device) -> Inputs:
    """What a configuration's network is trained on.

    Raises ValueError where the data has no classes, or other channels than the autoencoder.
    """
    if config.network.labels and data.train_labels is None:
        raise ValueError(
            f"labels is True, but data {config.data.source!r} has no classes; expected subfolders, or a set with labels"
        )
    labels = data.train_labels if config.network.labels else None
    if autoencoder is None:
        return Inputs(data.train, labels)
    channels = data.train.shape[1]
    if channels != autoencoder.channels:
        raise ValueError(
            f"autoencoder is {config.network.autoencoder!r}, for images of {autoencoder.channels} channels; expected one for "
            f"{channels}, as {config.data.source!r} has"
        )
    flips = config.data.augment == FLIP
    mirrored = _moments(autoencoder, data.train.flip(-1), device) if flips else None
    return Inputs(_moments(autoencoder, data.train, device), labels, mirrored)

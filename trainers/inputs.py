"""What the network is trained on: images, or latents that are encoded once and kept."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlflow_icr.extraction.files import cache_folder
from mlflow_icr.extraction.images import height_width
from mlflow_icr.extraction.latents import Autoencoder, LatentCache, encode_images, load_autoencoder
from mlflow_icr.monitoring.ranks import gather_rows, sum_over_ranks, world
from trainers.augmentation import FLIP
from trainers.config import TrainConfig
from trainers.data import DataSet

logger = logging.getLogger(__name__)

FAR = 1.6  # a factor: EDM's 0.5 for line drawings, whose deviation is 0.75, trains as well
# Share of a device's free memory, with the network and its optimizer on it: activations take most of the rest.
DEVICE_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class Inputs:
    """Images (N, C, H, W), as `Read.images`, or mean and deviation of latents, (N, 2 C, H, W) float32; and classes (N,).

    `mirrored` has the latents of mirror images, where these are trained on.
    """

    images: Tensor
    labels: Tensor | None = None
    mirrored: Tensor | None = None
    latent: bool = False
    on_host: bool = False  # where they do not fit the network's device: each batch's are copied there

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the network's input."""
        channels, height, width = self.images.shape[1:]
        return channels // (2 if self.latent else 1), height, width

    def deviation(self) -> float:
        """The standard deviation of what the network is trained on, all values together."""
        count, total, squares = 0, 0.0, 0.0
        for part in self.images.split(256):
            clean, *spread = part.double().chunk(2, 1) if self.latent else (as_input(part).double(),)
            count += clean.numel()
            total += float(clean.sum())
            squares += sum(float(values.square().sum()) for values in (clean, *spread))
        return math.sqrt(squares / count - (total / count) ** 2)

    def to(self, device: torch.device) -> Inputs:
        """The same with images on a device, where they fit; classes stay on the CPU, where batches are drawn."""
        labels = None if self.labels is None else self.labels.cpu()
        size = self.images.numel() * self.images.element_size() * (1 if self.mirrored is None else 2)
        if self.images.device.type == "cpu" and not fits(size, device):
            return replace(self, labels=labels, on_host=True)
        mirrored = None if self.mirrored is None else self.mirrored.to(device)
        return replace(self, images=self.images.to(device), labels=labels, mirrored=mirrored)


def fits(size: int, device: torch.device) -> bool:
    """Whether so many bytes of images leave a device enough for training; on the CPU they are in memory already."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return size <= DEVICE_SHARE * free


def as_input(images: Tensor) -> Tensor:
    """Images (B, C, H, W), uint8, uint16 or floats in [0, 1], as float32 in [-1, 1], on their device."""
    if images.is_floating_point():
        return images.float() * 2 - 1
    if images.dtype == torch.uint16:  # which devices can store, and do little else with
        return images.view(torch.int16).int().bitwise_and(0xFFFF).float() / 32767.5 - 1
    return images.float() / 127.5 - 1


def mirror(images: Tensor) -> Tensor:
    """Images (N, C, H, W) left to right; torch cannot turn unsigned 16 bits, which are turned as signed ones."""
    if images.dtype == torch.uint16:
        return images.view(torch.int16).flip(-1).view(torch.uint16)
    return images.flip(-1)


def take_rows(images: Tensor, indices: Tensor) -> Tensor:
    """The images with these indices; devices have no indexing of unsigned 16 bits, which are moved as signed ones."""
    if images.dtype == torch.uint16:
        return images.view(torch.int16)[indices].view(torch.uint16)
    return images[indices]


def open_autoencoder(config: TrainConfig, device: torch.device) -> Autoencoder | None:
    """The autoencoder of a configuration on a device, None for pixels.

    Raises ValueError where there is none, or latents do not fit the network.
    """
    if not config.network.autoencoder:
        return None
    autoencoder = load_autoencoder(config.network.autoencoder)
    height, width = height_width(config.data.size)
    if height % autoencoder.factor or width % autoencoder.factor:
        raise ValueError(
            f"resolution is {config.data.resolution}; expected a multiple of {autoencoder.factor}, of which the autoencoder "
            f"{config.network.autoencoder!r} makes one"
        )
    latent = height // autoencoder.factor, width // autoencoder.factor
    config.check_network(latent[0] if latent[0] == latent[1] else latent)
    autoencoder.network.to(device)
    return autoencoder


def _moments(autoencoder: Autoencoder, images: Tensor, device: torch.device) -> Tensor:
    """Latents of images that every rank has: cached if all ranks find them, else each encodes a share and one keeps all."""
    cache = LatentCache(cache_folder())
    cached = cache.find(autoencoder, images)
    rank, ranks = world()
    if sum_over_ranks(int(cached is not None), device) == ranks and cached is not None:
        return cached
    latents = gather_rows(encode_images(autoencoder, images[rank::ranks], device).to(device), len(images)).cpu()
    if rank == 0:
        cache.keep(autoencoder, images, latents)
    return latents


def inputs_of(config: TrainConfig, data: DataSet, autoencoder: Autoencoder | None, device: torch.device) -> Inputs:
    """The training inputs of a configuration's network.

    Raises ValueError where the data has no classes, or other channels than the autoencoder.
    """
    if config.network.labels and data.train_labels is None:
        by = f" besides those of group_by {config.data.group_by!r}" if config.data.group_by else ""
        raise ValueError(
            f"labels is True, but data {config.data.source!r} has no classes{by}; expected subfolders, or a set with labels"
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
    mirrored = _moments(autoencoder, mirror(data.train), device) if flips else None
    return Inputs(_moments(autoencoder, data.train, device), labels, mirrored, latent=True)


def with_measured(config: TrainConfig, inputs: Inputs) -> TrainConfig:
    """A configuration with EDM's sigma_data: the inputs' standard deviation, unless it is given. A value far off is logged.

    Raises ValueError for inputs that are all alike.
    """
    if config.network.family != "edm":
        return config
    measured, configured = inputs.deviation(), config.noise.sigma_data
    if configured is None:
        if measured < 1e-3:  # a quarter of a step of 8 bits
            raise ValueError(f"data is {config.data.source!r}, whose images are all of one value; expected some that differ")
        return config.changed(sigma_data=float(f"{measured:.3g}"))
    if not 1 / FAR < measured / configured < FAR:
        logger.warning("sigma_data is %g, but the inputs' standard deviation is %.3g", configured, measured)
    return config

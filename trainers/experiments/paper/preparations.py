"""Preparations of two trainings beyond the paper: an autoencoder of the rich set, and a folder with repeated images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mlflow_icr.extraction.keyed import keyed_generator
from mlflow_icr.extraction.latents import Autoencoder
from mlflow_icr.extraction.views import as_unit_interval
from trainers.data import data_of
from trainers.experiments.paper.plan import (
    DUPLICATES,
    EDM_FEW,
    EDM_MANY,
    LATENT_FEW,
    REPEATED,
    TIMES,
    AutoencoderPlan,
    Scale,
    Training,
    autoencoder_folder,
    duplicates_folder,
)

STOPPED = "autoencoder was stopped"


def whole_folder(place: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder, which is complete or absent."""
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    fill(part)
    os.replace(part, place)


def autoencoder_loss(network: Any, x: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Mean squared error of images x (B, C, H, W) in [-1, 1] from noised latents, plus the posterior's divergence from N(0, 1).

    Source: Kingma & Welling 2014; the small weight is that of Rombach et al. 2022, without their perceptual and adversarial
    terms. `noise` is of the latents' shape.
    """
    posterior = network.encode(x).latent_dist
    decoded = network.decode(posterior.mean + posterior.std * noise).sample
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).sum()
    return (decoded - x).square().mean() + kl_weight * divergence / x.numel()


def train_autoencoder(plan: AutoencoderPlan, images: Tensor, seed: int, wants_stop: Callable[[], bool]) -> Any:
    """A diffusers AutoencoderKL of images (N, C, H, W), whose `scaling_factor` gives latents of deviation 1.

    Raises InterruptedError when asked to stop: it is short, and begins again.
    """
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = len(plan.channels)
        network = AutoencoderKL(
            in_channels=images.shape[1],
            out_channels=images.shape[1],
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=plan.channels,
            layers_per_block=plan.layers,
            latent_channels=plan.latent_channels,
            norm_num_groups=8,
            sample_size=images.shape[-1],
        )
    optimizer = torch.optim.Adam(network.parameters(), lr=plan.learning_rate)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    draws, steps = keyed_generator("autoencoder", seed), max(1, round(1000 * plan.kimg / plan.batch_size))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.learning_rate, total_steps=steps + 1)
    side = [length // 2 ** (len(plan.channels) - 1) for length in images.shape[2:]]
    for _ in range(steps):
        if wants_stop():
            raise InterruptedError(STOPPED)
        chosen = torch.from_numpy(draws.integers(len(images), size=plan.batch_size))
        noise = torch.from_numpy(draws.standard_normal((plan.batch_size, plan.latent_channels, *side), dtype="float32"))
        loss = autoencoder_loss(network, as_unit_interval(images[chosen]).to(device) * 2 - 1, noise.to(device), plan.kl_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    network.to("cpu").requires_grad_(False)
    deviation = Autoencoder(network).encode(as_unit_interval(images[:1000]) * 2 - 1).std()
    network.register_to_config(scaling_factor=float(network.config.scaling_factor / deviation))
    return network


def write_repeated(images: Tensor, folder: Path) -> None:
    """Images (N, C, H, W) uint8 as PNG files, the first of them several times."""
    for number, image in enumerate(images):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy().squeeze())
        for copy in range(TIMES if number < REPEATED else 1):
            picture.save(folder / f"{number:05d}-{copy}.png")


def prepare(training: Training, scale: Scale, data: str, root: Path, wants_stop: Callable[[], bool]) -> None:
    """Make what a training needs and does not have yet. Raises InterruptedError when asked to stop."""

    def images_of(role: str) -> Tensor:
        # The images of the first seed's run, in its order.
        return data_of(next(t for t in scale.trainings() if t.role == role).config(data, root)).train

    if training.role == LATENT_FEW and not autoencoder_folder(root).exists():
        network = train_autoencoder(scale.autoencoder, images_of(EDM_MANY), training.seed, wants_stop)
        whole_folder(autoencoder_folder(root), lambda place: network.save_pretrained(place, safe_serialization=True))
    if training.role == DUPLICATES and not duplicates_folder(root).exists():
        images = images_of(EDM_FEW)
        whole_folder(duplicates_folder(root), lambda place: write_repeated(images, place))

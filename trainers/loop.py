"""The training loop: it steps and yields; the caller measures, logs and saves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mlflow_icr import EDMDenoiser
from mlflow_icr.extraction import keyed_generator
from trainers.config import TrainConfig
from trainers.edm import edm_loss, training_sigma
from trainers.engine import bare, whole

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(eq=False)
class TrainState:
    """What training changes: the weights, their average, the optimizer, and how far it has come."""

    network: nn.Module  # as Accelerate prepared it
    ema: nn.Module
    optimizer: torch.optim.Optimizer  # as Accelerate prepared it
    images_seen: int = 0
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # since the last measurement
    loss_steps: int = 0


class Order:
    """The order of the training images: one permutation an epoch, keyed by seed and epoch."""

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images, self.seed = num_images, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def at(self, start: int, stop: int) -> np.ndarray:
        """Image indices at the places [start, stop) of the endless order."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.num_images)
            if epoch != self._epoch:
                self._permutation = keyed_generator("order", self.seed, epoch).permutation(self.num_images)
                self._epoch = epoch
            parts.append(self._permutation[offset : offset + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class Batch:
    """Images (B, C, H, W) uint8, noise levels (B,), unit noise (B, C, H, W)."""

    images: Tensor
    sigma: Tensor
    noise: Tensor

    def part(self, place: int, parts: int) -> Batch:
        """One of equal consecutive parts."""
        size = len(self.images) // parts
        rows = slice(place * size, (place + 1) * size)
        return Batch(self.images[rows], self.sigma[rows], self.noise[rows])


def draw_batch(images: Tensor, order: Order, config: TrainConfig, images_seen: int) -> Batch:
    """The whole batch, of all ranks, that follows after images_seen: a function of the configuration and that number."""
    count = config.batch_size
    indices = torch.from_numpy(order.at(images_seen, images_seen + count))
    generator = keyed_generator("train", config.seed, images_seen)
    sigma = training_sigma(generator, count, config.p_mean, config.p_std)
    noise = torch.from_numpy(generator.standard_normal((count, *images.shape[1:]), dtype=np.float32))
    return Batch(images[indices.to(images.device)], sigma, noise)


def ema_beta(config: TrainConfig, images_seen: int) -> float:
    """The share of the old average that one batch keeps: EDM's half-life, at most ema_rampup_ratio of the images seen."""
    halflife = min(config.ema_halflife_kimg * 1000, images_seen * config.ema_rampup_ratio)
    return 0.5 ** (config.batch_size / max(halflife, 1e-8))


def new_state(network: nn.Module, config: TrainConfig, accelerator: Accelerator) -> TrainState:
    """A network at the start of its training, on the accelerator's device."""
    ema = copy.deepcopy(network).requires_grad_(False).eval().to(accelerator.device)
    # One kernel for all parameters, where the device has one; the numbers are Adam's.
    optimizer = torch.optim.Adam(
        network.parameters(), lr=config.learning_rate, fused=accelerator.device.type in ("cpu", "cuda")
    )
    network, optimizer = accelerator.prepare(network, optimizer)
    return TrainState(network, ema, optimizer, loss_sum=torch.zeros((), dtype=torch.float64, device=accelerator.device))


def train(state: TrainState, images: Tensor, config: TrainConfig, accelerator: Accelerator) -> Iterator[TrainState]:
    """Train on images (N, C, H, W) uint8, yielding the state after every optimizer step, for as long as it is asked.

    Order and noise are keyed by (seed, images seen, place in the batch), so that neither ranks, nor accumulation, nor a
    resumption change them. A rank takes an equal, consecutive share of each accumulated part. Dropout draws from the global
    generator, in the shape of a rank's share: it is keyed too, and by the rank, so that a resumption does not change it.
    """
    denoiser = EDMDenoiser(state.network, config.sigma_data)
    order = Order(len(images), config.seed)
    average = list(state.ema.parameters())
    weights = list(bare(state.network, accelerator).parameters())
    images, device = images.to(accelerator.device), accelerator.device
    state.network.train()
    while True:
        batch = draw_batch(images, order, config, state.images_seen)
        rate = config.learning_rate * min(1.0, (state.images_seen + config.batch_size) / max(config.rampup_kimg * 1000, 1e-8))
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        if config.dropout:
            key = keyed_generator("dropout", config.seed, state.images_seen, accelerator.process_index)
            torch.manual_seed(int(key.integers(2**63)))
        for place in range(accelerator.gradient_accumulation_steps):  # a launcher's configuration may have set it
            part = batch.part(place, accelerator.gradient_accumulation_steps)
            mine = part.part(accelerator.process_index, accelerator.num_processes)
            x = mine.images.float() / 127.5 - 1
            with accelerator.accumulate(state.network):
                loss = edm_loss(denoiser, x, mine.sigma.to(device), mine.noise.to(device), config.sigma_data)
                accelerator.backward(loss)
                state.optimizer.step()
                state.optimizer.zero_grad()
            state.loss_sum += loss.detach()
            state.loss_steps += 1
        state.images_seen += config.batch_size
        with torch.no_grad():
            get_ema_multi_avg_fn(ema_beta(config, state.images_seen))(average, [whole(w) for w in weights], 0)
        yield state


def take_mean_loss(state: TrainState, accelerator: Accelerator) -> float | None:
    """The mean training loss of all ranks since it was last taken, which starts anew; None when nothing was trained."""
    if not state.loss_steps:
        return None
    mean = accelerator.reduce(state.loss_sum / state.loss_steps, reduction="mean")
    state.loss_sum.zero_()
    state.loss_steps = 0
    return float(mean)

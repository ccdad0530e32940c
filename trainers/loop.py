"""The training loop: it steps and yields; the caller measures, logs and saves."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlflow_icr.extraction.averages import power_beta
from trainers.augment_labels import RowLabels, feed_labels
from trainers.augmentation import EDM
from trainers.batches import Ahead, Batch, Order, draw_batch, rows_of
from trainers.config import TrainConfig
from trainers.dropout import RowKeys, key_dropout
from trainers.engine import bare, is_sharded, local, share_of, use_channels_last
from trainers.families import Family
from trainers.inputs import Inputs
from trainers.optimizer import ema_beta, guard_gradients, learning_rate_at, make_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(eq=False)
class TrainState:
    """The state that training changes: the weights, their average, the optimizer, and how far it has come."""

    network: nn.Module  # as Accelerate prepared it
    ema: nn.Module
    optimizer: torch.optim.Optimizer  # as Accelerate prepared it
    dropout_keys: RowKeys  # where the network reads them
    augment_labels: RowLabels  # where the network reads them, too
    images_seen: int = 0
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # since the last measurement
    loss_steps: int = 0
    curve: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))  # losses, norms since its last point
    curve_steps: int = 0
    optimizer_steps: int = 0
    origin_images_seen: int = 0  # where the present batch size began
    # Optimizer steps skipped for gradients that are not finite, in all and in a row up to now; on the device, so that no step
    # waits for them.
    skipped: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))
    powers: dict[float, list[Tensor]] = field(default_factory=dict)  # power-function averages by relative width
    shares: list[Tensor] | None = None  # with sharded parameters: this rank's of the average; `ema` is whole on demand


def new_state(network: nn.Module, config: TrainConfig, accelerator: Accelerator) -> TrainState:
    """A network at the start of its training, on the accelerator's device."""
    use_channels_last(network, accelerator)
    ema = copy.deepcopy(network).requires_grad_(False).eval().to(accelerator.device)
    if config.optimizer.gradient_checkpointing:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
    optimizer = make_optimizer(network.parameters(), config.optimizer, accelerator.device)
    dropout_keys = key_dropout(network) if config.network.dropout_masks == "keyed" else RowKeys()
    augment_labels = feed_labels(network) if config.data.augment == EDM else RowLabels()
    network, optimizer = accelerator.prepare(network, optimizer)
    device, sums = accelerator.device, torch.float32 if accelerator.device.type == "mps" else torch.float64
    state = TrainState(
        network,
        ema,
        optimizer,
        dropout_keys,
        augment_labels,
        loss_sum=torch.zeros((), dtype=sums, device=device),
        curve=torch.zeros(2, dtype=sums, device=device),
        skipped=torch.zeros(2, dtype=torch.int64, device=device),
    )
    weights = [local(p).detach() for p in bare(network, accelerator).parameters()]
    state.powers = {std: [w.clone() for w in weights] for std in config.optimizer.power_ema_stds}
    if is_sharded(network):
        state.shares = [w.clone() for w in weights]
    return state


def train(state: TrainState, inputs: Inputs, family: Family, accelerator: Accelerator) -> Generator[TrainState]:
    """Train on inputs by a family's loss, yielding the state after every optimizer step, for as long as it is asked.

    Order, noise, dropped labels and dropout are keyed by (seed, images seen, place in the batch), so that neither ranks, nor
    accumulation, nor a resumption change them. A rank takes an equal, consecutive share of each accumulated part. The inputs
    live on the device, or, where they do not fit it, are brought there one batch ahead; nothing in a step waits for it.
    """
    config, optimizer = family.config, family.config.optimizer
    denoiser = family.denoiser(state.network)
    order = Order(len(inputs.images), config.run.seed)
    average: list[Tensor] = [*state.ema.parameters()] if state.shares is None else state.shares
    parameters = list(bare(state.network, accelerator).parameters())
    inputs = inputs.to(accelerator.device)
    device = state.loss_sum.device  # with its number
    state.network.train()

    accumulated = accelerator.gradient_accumulation_steps  # a launcher's configuration may have set it
    rows = rows_of(optimizer.batch_size, accumulated, accelerator.process_index, accelerator.num_processes)

    def share(images_seen: int) -> list[Batch]:
        local_batch = draw_batch(inputs, order, family, images_seen, rows)
        return [local_batch.part(place, accumulated) for place in range(accumulated)]

    with Ahead(share, optimizer.batch_size, device) as drawn:
        while True:
            parts = drawn(state.images_seen)
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate_at(optimizer, state.images_seen)
            for part in parts:
                local_part = part.to(device)
                state.dropout_keys.of_rows = local_part.dropout_keys
                augmented = local_part.augmented
                state.augment_labels.of_rows = None if augmented is None else augmented.labels
                with accelerator.accumulate(state.network):
                    loss = family.loss(
                        denoiser, local_part.clean(inputs), local_part.level, local_part.noise, local_part.labels
                    )
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm = guard_gradients(parameters, state.optimizer, state.skipped, accelerator, optimizer.clip_norm)
                        state.curve[1] += norm
                    state.optimizer.step()
                    state.optimizer.zero_grad()
                state.loss_sum += loss.detach()
                state.curve[0] += loss.detach() / accumulated
                state.loss_steps += 1
            state.images_seen += optimizer.batch_size
            state.optimizer_steps += 1
            state.curve_steps += 1
            with torch.no_grad():
                weights = [local(p) for p in parameters]
                torch._foreach_lerp_(average, weights, 1 - ema_beta(optimizer, state.images_seen))
                for std, power in state.powers.items():
                    beta = power_beta(std, state.images_seen, optimizer.batch_size)
                    torch._foreach_lerp_(power, weights, 1 - beta)
            yield state


@contextmanager
def whole_average(state: TrainState, accelerator: Accelerator) -> Iterator[None]:
    """A context in which `state.ema` holds the average; where it is sharded, every rank must enter, and it is freed after."""
    if state.shares is None:
        yield
        return
    parameters = list(bare(state.network, accelerator).parameters())
    for entire, share, like in zip(state.ema.parameters(), state.shares, parameters, strict=True):
        entire.data = share_of(share, like).full_tensor()
    try:
        yield
    finally:
        for entire in state.ema.parameters():
            entire.data = entire.data.new_empty(0)


def take_mean_loss(state: TrainState, accelerator: Accelerator) -> float | None:
    """The mean training loss of all ranks since the last call; None when nothing was trained.

    Not finite where a step's was not.
    """
    if not state.loss_steps:
        return None
    mean = accelerator.reduce(state.loss_sum / state.loss_steps, reduction="mean")
    state.loss_sum.zero_()
    state.loss_steps = 0
    return float(mean)

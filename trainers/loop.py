"""The training loop: it steps and yields; the caller measures, logs and saves."""

from __future__ import annotations

import copy
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainers.batches import Ahead, Batch, Order, draw_batch, rows_of
from trainers.config import TrainConfig
from trainers.dropout import RowKeys, key_dropout
from trainers.engine import bare, gathered, use_channels_last
from trainers.families import Family
from trainers.inputs import Inputs

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(eq=False)
class TrainState:
    """What training changes: the weights, their average, the optimizer, and how far it has come."""

    network: nn.Module  # as Accelerate prepared it
    ema: nn.Module
    optimizer: torch.optim.Optimizer  # as Accelerate prepared it
    dropout_keys: RowKeys  # where the network reads them
    images_seen: int = 0
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # since the last measurement
    loss_steps: int = 0
    optimizer_steps: int = 0
    origin_images_seen: int = 0  # where the present batch size began
    # On the device, so that no step waits to know them: optimizer steps left out for gradients that are not finite, in all and
    # in a row up to now.
    skipped: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))


def ema_beta(config: TrainConfig, images_seen: int) -> float:
    """The share of the old average that one batch keeps: EDM's half-life, at most ema_rampup_ratio of the images seen."""
    halflife = config.optimizer.ema_halflife_kimg * 1000
    if (ratio := config.optimizer.ema_rampup_ratio) is not None:
        halflife = min(halflife, images_seen * ratio)
    return 0.5 ** (config.optimizer.batch_size / max(halflife, 1e-8))


def new_state(network: nn.Module, config: TrainConfig, accelerator: Accelerator) -> TrainState:
    """A network at the start of its training, on the accelerator's device."""
    use_channels_last(network, accelerator)
    ema = copy.deepcopy(network).requires_grad_(False).eval().to(accelerator.device)
    # One kernel for all parameters, where the device has one; the numbers are Adam's.
    optimizer = torch.optim.Adam(
        network.parameters(), lr=config.optimizer.learning_rate, fused=accelerator.device.type in ("cpu", "cuda")
    )
    dropout_keys = key_dropout(network)
    network, optimizer = accelerator.prepare(network, optimizer)
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    skipped = torch.zeros(2, dtype=torch.int64, device=accelerator.device)
    return TrainState(network, ema, optimizer, dropout_keys, loss_sum=loss_sum, skipped=skipped)


def skip_if_not_finite(state: TrainState, accelerator: Accelerator) -> None:
    """Have the coming optimizer step change nothing if a gradient is not finite, and count it; the device decides by itself.

    The norm is that of all ranks' gradients, so all ranks skip the same steps. Fused Adam takes `found_inf` as it does from
    torch's gradient scaler, which in fp16 sees to the step itself; here it is only counted then.
    """
    gradients = [p.grad for p in bare(state.network, accelerator).parameters() if p.grad is not None]
    norm = gathered(torch.nn.utils.get_total_norm(gradients))
    bad = norm.isfinite().logical_not()
    if accelerator.scaler is None:
        optimizer: Any = getattr(state.optimizer, "optimizer", state.optimizer)
        optimizer.found_inf = bad.float()
    state.skipped[0] += bad
    state.skipped[1] = (state.skipped[1] + 1) * bad


def train(state: TrainState, inputs: Inputs, family: Family, accelerator: Accelerator) -> Generator[TrainState]:
    """Train on inputs by a family's loss, yielding the state after every optimizer step, for as long as it is asked.

    Order, noise, dropped labels and dropout are keyed by (seed, images seen, place in the batch), so that neither ranks, nor
    accumulation, nor a resumption change them. A rank takes an equal, consecutive share of each accumulated part. The inputs
    live on the device, or, where they do not fit it, are brought there one batch ahead; nothing in a step waits for it.
    """
    config = family.config
    denoiser = family.denoiser(state.network)
    order = Order(len(inputs.images), config.run.seed)
    average = list(state.ema.parameters())
    weights = list(bare(state.network, accelerator).parameters())
    inputs = inputs.to(accelerator.device)
    device = state.loss_sum.device  # with its number
    state.network.train()

    accumulated = accelerator.gradient_accumulation_steps  # a launcher's configuration may have set it
    rows = rows_of(config.optimizer.batch_size, accumulated, accelerator.process_index, accelerator.num_processes)

    def share(images_seen: int) -> list[Batch]:
        mine = draw_batch(inputs, order, family, images_seen, rows)
        return [mine.part(place, accumulated) for place in range(accumulated)]

    with Ahead(share, config.optimizer.batch_size, device) as drawn:
        while True:
            parts = drawn(state.images_seen)
            ramp = min(1.0, (state.images_seen + config.optimizer.batch_size) / max(config.optimizer.rampup_kimg * 1000, 1e-8))
            for group in state.optimizer.param_groups:
                group["lr"] = config.optimizer.learning_rate * ramp
            for part in parts:
                mine = part.to(device)
                state.dropout_keys.of_rows = mine.dropout_keys
                with accelerator.accumulate(state.network):
                    loss = family.loss(denoiser, mine.clean(inputs), mine.level, mine.noise, mine.labels)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        skip_if_not_finite(state, accelerator)
                    state.optimizer.step()
                    state.optimizer.zero_grad()
                state.loss_sum += loss.detach()
                state.loss_steps += 1
            state.images_seen += config.optimizer.batch_size
            state.optimizer_steps += 1
            with torch.no_grad():
                get_ema_multi_avg_fn(ema_beta(config, state.images_seen))(average, [gathered(w) for w in weights], 0)
            yield state


def take_mean_loss(state: TrainState, accelerator: Accelerator) -> float | None:
    """The mean training loss of all ranks since it was last taken, which starts anew; None when nothing was trained.

    Not finite where a step's was not.
    """
    if not state.loss_steps:
        return None
    mean = accelerator.reduce(state.loss_sum / state.loss_steps, reduction="mean")
    state.loss_sum.zero_()
    state.loss_steps = 0
    return float(mean)

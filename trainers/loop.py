"""The training loop: it steps and yields; the caller measures, logs and saves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mlflow_icr.extraction import keyed_generator
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
    """Which inputs (B,), noise levels (B,), unit noise (B, C, H, W), and where the model has them classes (B,).

    Of latents, `spread` is the unit noise (B, C, H, W) that says which one of the posterior is taken. `dropout_keys` (B,) int64
    are there where the network has dropout.
    """

    indices: Tensor
    level: Tensor
    noise: Tensor
    labels: Tensor | None = None
    spread: Tensor | None = None
    dropout_keys: Tensor | None = None

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        given = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        changed: dict[str, Any] = {name: value if value is None else change(value) for name, value in given}
        return Batch(**changed)

    def part(self, place: int, parts: int) -> Batch:
        """One of equal consecutive parts."""
        size = len(self.indices) // parts
        rows = slice(place * size, (place + 1) * size)
        return self._each(lambda value: value[rows])

    def pinned(self) -> Batch:
        """The same in memory that a CUDA device copies from by itself."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The same on a device; nobody waits for a CUDA device to have it."""
        return self._each(lambda value: value.to(device, non_blocking=device.type == "cuda"))

    def clean(self, inputs: Inputs) -> Tensor:
        """What is noised, (B, C, H, W), of inputs on the batch's device: images in [-1, 1], or latents."""
        chosen = inputs.images[self.indices]
        if self.spread is None:
            return chosen.float() / 127.5 - 1
        mean, deviation = chosen.chunk(2, 1)
        return mean + deviation * self.spread


def draw_batch(inputs: Inputs, order: Order, family: Family, images_seen: int) -> Batch:
    """The whole batch, of all ranks, that follows after images_seen: a function of the configuration and that number.

    It is on the CPU, wherever the images are; classes must be there too.
    """
    config, count = family.config, family.config.batch_size

    def stream(purpose: str) -> np.random.Generator:
        return keyed_generator(purpose, config.seed, images_seen)

    def unit(generator: np.random.Generator) -> Tensor:
        return torch.from_numpy(generator.standard_normal((count, *inputs.shape), dtype=np.float32))

    indices = torch.from_numpy(order.at(images_seen, images_seen + count))
    generator = stream("train")
    level = family.draw(generator, count)
    noise = unit(generator)
    labels = None
    if inputs.labels is not None and family.null_class is not None:
        dropped = torch.from_numpy(stream("label dropout").random(count) < config.label_dropout)
        labels = torch.where(dropped, family.null_class, inputs.labels[indices])
    spread = unit(stream("posterior")) if inputs.latent else None
    keys = torch.from_numpy(stream("dropout").integers(2**63, size=count)) if config.dropout else None
    return Batch(indices, level, noise, labels, spread, keys)


class Ahead:
    """A context that draws batches one ahead in a thread, so that the device need not wait for the host's random numbers.

    `draw(images_seen)` gives a rank's share in parts, one for each accumulated step; it is pinned where `device` is a CUDA
    device. What goes wrong in the thread is raised where its batch is asked for. Leaving the context ends the thread.
    """

    def __init__(self, draw: Callable[[int], list[Batch]], batch_size: int, device: torch.device) -> None:
        self._draw, self._size, self._pin = draw, batch_size, device.type == "cuda"
        # A new thread's device is the first one: pinning memory there would put another context on it, of every rank.
        self._pool = ThreadPoolExecutor(1, "draw", partial(torch.cuda.set_device, device) if self._pin else None)
        # A context that is never left ends with Python, while what ending takes is still there.
        self._end = finalize(self, self._pool.shutdown, cancel_futures=True)
        self._at = -1
        self._next: Future[list[Batch]]

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _parts(self, images_seen: int) -> list[Batch]:
        parts = self._draw(images_seen)
        return [part.pinned() for part in parts] if self._pin else parts

    def __call__(self, images_seen: int) -> list[Batch]:
        """The parts that follow after images_seen; those after them are begun."""
        found = self._next if self._at == images_seen else self._pool.submit(self._parts, images_seen)
        self._at = images_seen + self._size
        self._next = self._pool.submit(self._parts, self._at)
        return found.result()


def ema_beta(config: TrainConfig, images_seen: int) -> float:
    """The share of the old average that one batch keeps: EDM's half-life, at most ema_rampup_ratio of the images seen."""
    halflife = min(config.ema_halflife_kimg * 1000, images_seen * config.ema_rampup_ratio)
    return 0.5 ** (config.batch_size / max(halflife, 1e-8))


def new_state(network: nn.Module, config: TrainConfig, accelerator: Accelerator) -> TrainState:
    """A network at the start of its training, on the accelerator's device."""
    use_channels_last(network, accelerator)
    ema = copy.deepcopy(network).requires_grad_(False).eval().to(accelerator.device)
    # One kernel for all parameters, where the device has one; the numbers are Adam's.
    optimizer = torch.optim.Adam(
        network.parameters(), lr=config.learning_rate, fused=accelerator.device.type in ("cpu", "cuda")
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
    live on the device; nothing in a step waits for it.
    """
    config = family.config
    denoiser = family.denoiser(state.network)
    order = Order(len(inputs.images), config.seed)
    average = list(state.ema.parameters())
    weights = list(bare(state.network, accelerator).parameters())
    inputs = inputs.to(accelerator.device)
    device = inputs.images.device  # with its number
    state.network.train()

    def share(images_seen: int) -> list[Batch]:
        batch, parts = draw_batch(inputs, order, family, images_seen), accelerator.gradient_accumulation_steps
        mine = accelerator.process_index, accelerator.num_processes
        return [batch.part(place, parts).part(*mine) for place in range(parts)]  # a launcher's configuration may have set parts

    with Ahead(share, config.batch_size, device) as drawn:
        while True:
            parts = drawn(state.images_seen)
            ramp = min(1.0, (state.images_seen + config.batch_size) / max(config.rampup_kimg * 1000, 1e-8))
            for group in state.optimizer.param_groups:
                group["lr"] = config.learning_rate * ramp
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
            state.images_seen += config.batch_size
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

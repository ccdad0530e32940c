"""Batches: images, noise levels and noise of a step, drawn by keys. Each rank draws its share, one batch ahead.

Small numbers (order, levels, dropped labels, augmentations, dropout's keys) are drawn for the whole batch in one stream each,
which takes some microseconds. The noise, which is nearly all of the work, has a place of its own in a counter-based stream for
each row (`keyed_rows`): a rank draws the rows of its share alone, and they are the rows of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from types import TracebackType
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from mlflow_icr.extraction.keyed import keyed_generator, keyed_rows
from trainers.augmentation import EDM, FLIP, Augmented, augment, draw_augmented, draw_mirrored, mirrored_where
from trainers.families import Family
from trainers.inputs import Inputs, as_input, take_rows


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
    """Indices of inputs (B,), noise levels (B,), unit noise (B, C, H, W) and, if the model has classes, classes (B,).

    With latents, `spread` is the unit noise (B, C, H, W) that draws one from the posterior. `dropout_keys` (B,) int64 are there
    if the network has dropout, `mirrored` (B,) bool if mirror images are trained on, and `augmented` if EDM's pipe is used.
    `chosen` are the inputs themselves, if they are kept on the host.
    """

    indices: Tensor
    level: Tensor
    noise: Tensor
    labels: Tensor | None = None
    spread: Tensor | None = None
    dropout_keys: Tensor | None = None
    mirrored: Tensor | None = None
    augmented: Augmented | None = None
    chosen: Tensor | None = None

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {}
        for entry in fields(self):
            match getattr(self, entry.name):
                case Augmented() as several:
                    changed[entry.name] = Augmented(*map(change, several))
                case None:
                    pass
                case value:
                    changed[entry.name] = change(value)
        return Batch(**changed)

    def part(self, place: int, parts: int) -> Batch:
        """One of equal consecutive parts."""
        size = len(self.indices) // parts
        rows = slice(place * size, (place + 1) * size)
        return self._each(lambda value: value[rows])

    def pinned(self) -> Batch:
        """The same batch in pinned memory, from which a CUDA device copies by itself."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; a copy to CUDA is not waited for."""
        return self._each(lambda value: value.to(device, non_blocking=device.type == "cuda"))

    def clean(self, inputs: Inputs) -> Tensor:
        """The clean rows (B, C, H, W), from inputs on the batch's device: images in [-1, 1], or latents."""
        chosen = _rows(inputs, self.indices, self.mirrored) if self.chosen is None else self.chosen
        if self.spread is None:
            images = as_input(chosen)
            if self.augmented is not None:
                return augment(images, self.augmented)
            return images if self.mirrored is None else mirrored_where(self.mirrored, images, images.flip(-1))
        mean, deviation = chosen.chunk(2, 1)
        return mean + deviation * self.spread


def _rows(inputs: Inputs, indices: Tensor, mirrored: Tensor | None) -> Tensor:
    """The inputs (B, ...) with these indices; with latents, those of the mirror images where `mirrored` (B,) is true."""
    rows = take_rows(inputs.images, indices)
    if mirrored is None or inputs.mirrored is None:
        return rows
    return mirrored_where(mirrored, rows, inputs.mirrored[indices])


def rows_of(batch_size: int, parts: int, rank: int, ranks: int) -> np.ndarray:
    """A rank's rows of a batch: an equal, consecutive share of each of its accumulated parts, in their order."""
    return np.arange(batch_size).reshape(parts, ranks, -1)[:, rank].ravel()


def draw_batch(inputs: Inputs, order: Order, family: Family, images_seen: int, rows: np.ndarray | None = None) -> Batch:
    """The batch that follows images_seen, or these rows of it: a function of the configuration and that number.

    It is on the CPU, wherever the images are; classes must be there too.
    """
    config, count = family.config, family.config.optimizer.batch_size
    local_rows = np.arange(count) if rows is None else rows

    def stream(purpose: str) -> np.random.Generator:
        return keyed_generator(purpose, config.run.seed, images_seen)

    def unit(purpose: str) -> Tensor:
        return torch.from_numpy(keyed_rows(purpose, config.run.seed, images_seen, rows=local_rows, shape=inputs.shape))

    indices = torch.from_numpy(order.at(images_seen, images_seen + count)[local_rows])
    level = family.draw(stream("level"), count)[torch.from_numpy(local_rows)]
    labels = None
    if inputs.labels is not None and family.null_class is not None:
        dropped = torch.from_numpy(stream("label dropout").random(count)[local_rows] < config.network.label_dropout)
        labels = torch.where(dropped, family.null_class, inputs.labels[indices])
    has_keys = bool(config.network.dropout) and config.network.dropout_masks == "keyed"
    spread = unit("posterior") if inputs.latent else None
    keys = torch.from_numpy(stream("dropout").integers(2**63, size=count)[local_rows]) if has_keys else None
    mirrored = draw_mirrored(stream("mirror"), count)[torch.from_numpy(local_rows)] if config.data.augment == FLIP else None
    augmented = None
    if config.data.augment == EDM:
        entire = draw_augmented(stream("augment"), count, config.data.augment_probability, inputs.shape[1:])
        augmented = Augmented(*(value[torch.from_numpy(local_rows)] for value in entire))
    chosen = _rows(inputs, indices, mirrored) if inputs.on_host else None
    return Batch(indices, level, unit("noise"), labels, spread, keys, mirrored, augmented, chosen)


class Ahead:
    """A context that draws batches one ahead in a thread, so that the device need not wait for the host's random numbers.

    `draw(images_seen)` gives a rank's share in parts, one for each accumulated step; it is pinned where `device` is a CUDA
    device. An error in the thread is raised when its batch is requested. Leaving the context ends the thread.
    """

    def __init__(self, draw: Callable[[int], list[Batch]], batch_size: int, device: torch.device) -> None:
        self._draw, self._size, self._pin = draw, batch_size, device.type == "cuda"
        # A new thread's device is the first one: pinning memory there would put another context on it, of every rank.
        self._pool = ThreadPoolExecutor(1, "draw", partial(torch.cuda.set_device, device) if self._pin else None)
        # A context that is never left ends with Python, before the modules that ending needs are gone.
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
        """The parts that follow images_seen; drawing the next ones begins."""
        pending = self._next if self._at == images_seen else self._pool.submit(self._parts, images_seen)
        self._at = images_seen + self._size
        self._next = self._pool.submit(self._parts, self._at)
        return pending.result()

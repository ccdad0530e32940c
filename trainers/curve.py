"""The curve of a training: loss, learning rate, gradient norm, speed, memory and skipped steps, every so many steps.

Values on the device are copied after the steps that are queued. A thread waits for them, reads the memory, and gives the point
to the tracker, while training goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlflow_icr.tracking.logged import Logged
from trainers.loop import TrainState

if TYPE_CHECKING:
    from accelerate import Accelerator

GIB = 2**30


@dataclass(frozen=True)
class _Point:
    """The values that the host has when a point is due; sums of losses and norms, and skipped steps, come later."""

    images_seen: int
    steps: int
    learning_rate: float
    images_per_second: float | None


def used_memory(device: torch.device) -> float | None:
    """GiB: the most that tensors on a CUDA device took since the last call, else this process's memory; None if unknown."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most / GIB
    try:
        resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
        return int(resident.split()[1]) * 1024 / GIB
    except (OSError, StopIteration):
        return None


def _start_copy(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy of values on the host, with an event for its arrival; from CUDA it comes after the queued work."""
    if values.device.type != "cuda":
        return values.cpu(), None
    copy = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return copy, arrived


class Curve:
    """Hands `log` a point every `every` steps, in a thread of its own; 0 is never. Every rank has one, and one rank's logs.

    `skipped` steps were left out before. `log` is called in that thread only, and after `flush` no call is under way. An error
    in it is raised by the next `step` or `flush`.
    """

    def __init__(
        self, every: int, accelerator: Accelerator, log: Callable[[Logged], object] | None, *, skipped: int = 0
    ) -> None:
        self.every, self.accelerator, self.log = every, accelerator, log
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="curve") if log is not None else None
        self._waiting: list[Future[None]] = []
        self._skipped = float(skipped)  # as of the last point; only the thread uses it
        self.start_clock(0)

    def start_clock(self, images_seen: int) -> None:
        """Count time from here: measuring and saving in between are not training."""
        self._since, self._from = time.perf_counter(), images_seen

    def step(self, state: TrainState) -> None:
        """Log a point after a step, if one is due. Raises an error from logging an earlier one."""
        if not self.every or state.curve_steps < self.every:
            return
        # The sum over ranks is queued like a step; nothing waits for it here.
        sums = torch.cat([state.curve, state.skipped[:1].to(state.curve.dtype)])
        mean = self.accelerator.reduce(sums, reduction="mean")
        steps, seconds = state.curve_steps, time.perf_counter() - self._since
        rate = (state.images_seen - self._from) / seconds if state.images_seen > self._from else None
        state.curve.zero_()
        state.curve_steps = 0
        self.start_clock(state.images_seen)
        if self._pool is None:
            return
        point = _Point(state.images_seen, steps, float(state.optimizer.param_groups[0]["lr"]), rate)
        self._raise_earlier()
        self._waiting.append(self._pool.submit(self._log, point, *_start_copy(mean)))

    def _log(self, point: _Point, values: Tensor, arrived: torch.cuda.Event | None) -> None:
        if arrived is not None:
            arrived.synchronize()
        losses, norms, skipped = values.tolist()
        good = point.steps - (skipped - self._skipped)
        self._skipped = skipped
        point_values: dict[str, float | None] = {
            "curve/loss": losses / point.steps,
            "curve/learning_rate": point.learning_rate,
            "curve/gradient_norm": norms / good if good > 0 else None,
            "curve/images_per_second": point.images_per_second,
            "curve/memory_gib": used_memory(self.accelerator.device),
            "curve/skipped_steps": skipped,
        }
        finite = {key: value for key, value in point_values.items() if value is not None and math.isfinite(value)}
        assert self.log is not None
        self.log(Logged(point.images_seen, time.time(), finite))

    def _raise_earlier(self) -> None:
        while self._waiting and self._waiting[0].done():
            self._waiting.pop(0).result()

    def flush(self) -> None:
        """Wait until every point is logged. Raises an error from logging one."""
        while self._waiting:
            self._waiting.pop(0).result()

    def close(self) -> None:
        """End the thread, after the call that is under way."""
        if self._pool is not None:
            self._pool.shutdown()

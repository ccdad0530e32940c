"""Decisions that all ranks make together between two steps: to stop, to save, or to give up a diverged training."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trainers.loop import TrainState

if TYPE_CHECKING:
    from accelerate import Accelerator

# Ranks must stop at the same step. Asking all of them after every step would make each wait for the others' hosts.
ASK_EVERY_STEPS = 8
SKIPPED_IN_A_ROW = 20  # steps without a finite gradient; fp16's scaler needs at most 16 to halve 2^16 down to 1


class TrainingError(RuntimeError):
    """Training cannot go on as it is; the message is one line that says what to change."""


class DivergedError(TrainingError):
    """No step has a finite gradient any more, or the weights are not finite."""

    def __init__(self, learning_rate: float, what: str) -> None:
        super().__init__(
            f"learning_rate is {learning_rate:g}: {what}; "
            "expected a lower one: continue from the last good checkpoint with --resume --learning-rate LOWER"
        )


class LateReading:
    """A number on a device, read with a delay of some steps, so that reading never waits for the device."""

    def __init__(self) -> None:
        self.value = 0
        self._copy: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def poll(self, number: torch.Tensor) -> None:
        """Take the value that has arrived, and request the present one."""
        if self._copy is not None and (self._arrived is None or self._arrived.query()):
            self.value, self._copy = int(self._copy), None
        if self._copy is not None:
            return
        if number.device.type != "cuda":
            self.value = int(number)
            return
        self._copy = torch.empty_like(number, device="cpu", pin_memory=True).copy_(number, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()


@dataclass(frozen=True)
class Decision:
    """The next action of all ranks."""

    stop: bool = False
    save: bool = False


class Agreement:
    """Decides before every step, on every rank. `save_every_minutes` is the wall time between checkpoints, 0 for none."""

    def __init__(self, accelerator: Accelerator, learning_rate: float, save_every_minutes: float) -> None:
        self.accelerator, self.learning_rate, self.save_seconds = accelerator, learning_rate, 60 * save_every_minutes
        self._skipped_in_row = LateReading()
        self.saved()

    def saved(self) -> None:
        """A checkpoint was written: the time to the next one begins."""
        self._saved_at = time.monotonic()

    def ask(self, state: TrainState, stop: bool, trained: int) -> Decision:
        """The decision after `trained` steps, the same on all ranks; any rank may ask to stop. Raises DivergedError."""
        save = bool(self.save_seconds) and time.monotonic() - self._saved_at >= self.save_seconds
        if self.accelerator.num_processes > 1:
            if trained % ASK_EVERY_STEPS:
                return Decision()
            wishes = torch.tensor([float(stop), float(save)], device=self.accelerator.device)
            totals = self.accelerator.reduce(torch.cat([wishes, state.skipped[1:].float()]), reduction="sum").tolist()
            self.refuse_divergence(round(totals[2] / self.accelerator.num_processes))
            return Decision(totals[0] > 0, totals[1] > 0)
        if trained % ASK_EVERY_STEPS == 0:
            self._skipped_in_row.poll(state.skipped[1])
        self.refuse_divergence(self._skipped_in_row.value)
        return Decision(stop, save)

    def refuse_divergence(self, skipped: int, limit: int = SKIPPED_IN_A_ROW) -> None:
        """Raise DivergedError after so many skipped steps in a row."""
        if skipped >= limit:
            raise DivergedError(self.learning_rate, f"the gradients of the last {skipped} steps were not finite")

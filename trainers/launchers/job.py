"""The types of a launcher: a job (one training run), its outcome, and the launcher itself. Imports nothing heavy."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

FINISHED, FAILED, KILLED, RUNNING = "FINISHED", "FAILED", "KILLED", "RUNNING"
# Signals that end a trainer, after a checkpoint: its exit status is 128 + one of them, or minus one in its first seconds.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def stop_signals() -> list[signal.Signals]:
    """The signals that end a trainer here: SIGHUP, of a closed terminal, is none where it is ignored, as nohup does it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (ignored and number == signal.SIGHUP)]


@dataclass(frozen=True)
class Job:
    """A run's name, its command line, the file that exists once the run has begun, and the log that it appends to.

    Without `begun` the command resumes by itself where it can.
    """

    name: str
    command: tuple[str, ...]
    begun: Path | None
    log: Path

    def line(self) -> list[str]:
        """The command line for now: with --resume where the run has begun."""
        return [*self.command, *(["--resume"] if self.begun is not None and self.begun.exists() else [])]


@dataclass(frozen=True)
class Ended:
    """The outcome of a job: FINISHED, FAILED with the reason, KILLED (stopped, can resume), or RUNNING (not waited for)."""

    name: str
    status: str
    why: str = ""


class Launcher(Protocol):
    """Runs jobs; the failure of one does not affect the others."""

    def run(
        self, jobs: Sequence[Job], wants_stop: Callable[[], bool], echo: Callable[[str], None]
    ) -> Generator[Ended, None, None]:
        """Yield each job's outcome as it ends; after `wants_stop`, those known of the rest. `echo` gets lines on progress.

        Raises OSError when no job can be started at all.
        """


def was_stopped(code: int) -> bool:
    """Whether an exit status is that of a trainer that was asked to stop."""
    return code in {128 + number for number in STOP_SIGNALS} | {-number for number in STOP_SIGNALS}

"""Run the trainings of one study side by side, as jobs of any launcher, with names before their output; all end together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainers.launchers.job import FINISHED, Ended, Job
from trainers.launchers.local import LocalLauncher
from trainers.train import CONFIG


@dataclass(frozen=True)
class Sibling:
    """One run: its name in the study, its output folder, and the flags of `trainers.train`."""

    name: str
    folder: Path
    flags: Sequence[str]

    @property
    def job(self) -> Job:
        """The job that launches the run; its output is in the study's `logs/` too."""
        command = (sys.executable, "-m", "trainers.train", *self.flags)
        return Job(self.name, command, self.folder / CONFIG, self.folder.parent / "logs" / f"{self.name}.log")


def run_siblings(siblings: Sequence[Sibling], parallel: int, wants_stop: Callable[[], bool]) -> Mapping[str, Ended]:
    """Train all of them, `parallel` at a time; returns the outcome of each that was started, by its name.

    When one fails, or `wants_stop` says so, the others are asked to stop as by SIGTERM, and no further one starts.
    """
    width = max(len(sibling.name) for sibling in siblings)
    ended: dict[str, Ended] = {}

    def echo(name: str, line: str) -> None:
        print(f"[{name:{width}}] {line}", end="", flush=True)

    flags = [flag for sibling in siblings for flag in sibling.flags if flag.startswith("--num-processes")]
    launcher = LocalLauncher(parallel, on_output=echo, one_gpu_each=all(flag == "--num-processes=1" for flag in flags))

    def stops() -> bool:
        return wants_stop() or any(outcome.status != FINISHED for outcome in ended.values())

    for outcome in launcher.run([sibling.job for sibling in siblings], stops, lambda text: None):
        ended[outcome.name] = outcome
    return ended

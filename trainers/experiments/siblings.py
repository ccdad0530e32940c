"""Runs of one study, side by side: child processes, their output with a name in front, and one fate."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LOOK_EVERY_SECONDS = 0.2
GRACE_SECONDS = 60.0  # for a child that was asked to stop: its measurement in progress, its checkpoint


@dataclass(frozen=True)
class Sibling:
    """One run: its name in the study and the flags of `trainers.train`."""

    name: str
    flags: Sequence[str]
    output_dir: Path


def _environment(parallel: int) -> dict[str, str]:
    """The children's: a run of their own each, and a fair share of the cores."""
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_RUN_ID"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // parallel)))
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def _tell(name: str, width: int, child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        print(f"[{name:{width}}] {line}", end="", flush=True)


def run_siblings(siblings: Sequence[Sibling], parallel: int, wants_stop: Callable[[], bool]) -> Mapping[str, int]:
    """Train all of them, `parallel` at a time; returns the exit status of each that was started, by its name.

    When one fails, or `wants_stop` says so, the others are asked to stop as by SIGTERM, and no further one starts.
    """
    width = max(len(sibling.name) for sibling in siblings)
    waiting, running, ended = list(siblings), {}, {}  # type: ignore[var-annotated]
    tellers = []
    asked_at: float | None = None
    while running or (waiting and asked_at is None):
        while waiting and len(running) < parallel and asked_at is None:
            sibling = waiting.pop(0)
            child = subprocess.Popen(
                [sys.executable, "-m", "trainers.train", *sibling.flags],
                env=_environment(min(parallel, len(siblings))),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # Ctrl-C reaches us alone, and we ask the children once
            )
            tellers.append(threading.Thread(target=_tell, args=(sibling.name, width, child), daemon=True))
            tellers[-1].start()
            running[sibling.name] = child
        time.sleep(LOOK_EVERY_SECONDS)
        for name, child in list(running.items()):
            if child.poll() is not None:
                ended[name] = child.returncode
                del running[name]
        if asked_at is None and (wants_stop() or any(ended.values())):
            asked_at = time.monotonic()
            for child in running.values():
                child.terminate()
        elif asked_at is not None and time.monotonic() - asked_at > GRACE_SECONDS:
            for child in running.values():
                child.kill()
    for teller in tellers:
        teller.join()
    return ended

"""Runs of one study, side by side: child processes, their output with a name in front, and one fate."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LOOK_EVERY_SECONDS = 0.2
GRACE_SECONDS = 300.0  # for a child that was asked to stop: its measurement in progress, its checkpoint


@dataclass(frozen=True)
class Sibling:
    """One run: its name in the study and the flags of `trainers.train`."""

    name: str
    flags: Sequence[str]


def _cores() -> int:
    """The cores that this process may use; not all systems tell that, and then all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(parallel: int) -> dict[str, str]:
    """The children's: a run of their own each, and a fair share of the cores."""
    variables = {key: value for key, value in os.environ.items() if key != "MLFLOW_RUN_ID"}
    # With more threads than cores, those that wait burn what those that work need, and training crawls.
    given = variables.get("OMP_NUM_THREADS", "")
    variables["OMP_NUM_THREADS"] = str(max(1, (int(given) if given.isdigit() else _cores()) // parallel))
    variables["PYTHONUNBUFFERED"] = "1"
    return variables


def _tell(name: str, width: int, child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        print(f"[{name:{width}}] {line}", end="", flush=True)


def _start(sibling: Sibling, variables: Mapping[str, str], width: int) -> tuple[subprocess.Popen[str], threading.Thread]:
    child = subprocess.Popen(
        [sys.executable, "-m", "trainers.train", *sibling.flags],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C reaches us alone, and we ask the children once
    )
    teller = threading.Thread(target=_tell, args=(sibling.name, width, child), daemon=True)
    teller.start()
    return child, teller


def _end(children: Mapping[str, subprocess.Popen[str]]) -> None:
    """Ask children to stop, and wait for that; kill those that do not in time."""
    for child in children.values():
        child.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children.values():
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def run_siblings(siblings: Sequence[Sibling], parallel: int, wants_stop: Callable[[], bool]) -> Mapping[str, int]:
    """Train all of them, `parallel` at a time; returns the exit status of each that was started, by its name.

    When one fails, or `wants_stop` says so, the others are asked to stop as by SIGTERM, and no further one starts.
    """
    width = max(len(sibling.name) for sibling in siblings)
    variables = environment(min(parallel, len(siblings)))
    waiting = list(siblings)
    children: dict[str, subprocess.Popen[str]] = {}
    tellers = []
    try:
        while True:
            running = [child for child in children.values() if child.poll() is None]
            failed = any(child.returncode for child in children.values())
            if failed or wants_stop() or not (waiting or running):
                break
            if waiting and len(running) < parallel:
                sibling = waiting.pop(0)
                children[sibling.name], teller = _start(sibling, variables, width)
                tellers.append(teller)
            else:
                time.sleep(LOOK_EVERY_SECONDS)
    finally:
        _end(children)
        for teller in tellers:
            teller.join()
    return {name: child.returncode for name, child in children.items()}

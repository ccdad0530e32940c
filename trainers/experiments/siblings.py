"""Runs of one study, side by side: child processes, their output with a name in front, and one fate."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainers.launchers.processes import end_children, environment

LOOK_EVERY_SECONDS = 0.2


@dataclass(frozen=True)
class Sibling:
    """One run: its name in the study and the flags of `trainers.train`."""

    name: str
    flags: Sequence[str]


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
        end_children(children.values())
        for teller in tellers:
            teller.join()
    return {name: child.returncode for name, child in children.items()}

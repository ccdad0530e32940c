"""How a run ends that nobody ended: by an exception that left the program, or by the program's end."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress


def status_of(error: BaseException | None) -> str:
    """FINISHED without an error, KILLED for an interruption or an exit with a signal's status, else FAILED."""
    if error is None:
        return "FINISHED"
    if isinstance(error, KeyboardInterrupt):
        return "KILLED"
    if isinstance(error, SystemExit):
        code = error.code
        if code is None or code == 0:
            return "FINISHED"
        return "KILLED" if isinstance(code, int) and code > 128 else "FAILED"
    return "FAILED"


def end_at_exit(close: Callable[[str], object]) -> Callable[[], None]:
    """Call `close(status)` when the interpreter ends; returns what takes that back.

    An exception that nobody caught has gone through the interpreter by then, and is what the status comes from. An exit by
    `sys.exit` has not: it counts as FINISHED, as it does with MLflow. Register it after MLflow was imported, which ends its
    active run at exit as FINISHED: the last that registers is the first that is called.
    """
    before = getattr(sys, "last_value", None)

    def end() -> None:
        error = getattr(sys, "last_value", None)
        close(status_of(None if error is before else error))

    atexit.register(end)
    return lambda: atexit.unregister(end)


def end_as_rank() -> Callable[[int], int]:
    """Let a process that is one of several ranks end without the interpreter's finalization, once its exit status is told.

    Returns a function that notes the status and gives it back. Gloo's threads live on after `destroy_process_group` where
    DistributedDataParallel was used (torch 2.13), and native threads do not bear the interpreter finalizing: a rank that had
    ended well was seen to abort there, rarely, on a loaded machine. Call it before other exit handlers are registered: the
    first that registers is the last that is called, so all of them, and the threads that Python waits for, come before.
    """
    told: list[int] = []

    def leave() -> None:
        if told and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # a closed pipe
                    stream.flush()
            os._exit(told[-1])

    def tell(status: int) -> int:
        told.append(status)
        return status

    atexit.register(leave)
    return tell

"""How a process ends that is one of several ranks."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress


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

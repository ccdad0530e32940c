"""The end of a process that is one of several ranks."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress


def end_as_rank() -> Callable[[int], int]:
    """Make a rank's process exit without the interpreter's finalization, once its exit status is known.

    Returns a function that takes the status and returns it. After DistributedDataParallel (torch 2.13), Gloo's threads survive
    `destroy_process_group`, and native threads may crash while the interpreter finalizes: rarely, on a loaded machine, a rank
    that had finished aborted then. Call this before other exit handlers are registered. Handlers run in reverse order, so all
    others, and the threads that Python waits for, come first.
    """
    statuses: list[int] = []

    def leave() -> None:
        if statuses and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # a closed pipe
                    stream.flush()
            os._exit(statuses[-1])

    def set_status(status: int) -> int:
        statuses.append(status)
        return status

    atexit.register(leave)
    return set_status

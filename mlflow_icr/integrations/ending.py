"""How a run ends that nobody ended: by an exception that left the program, or by the program's end."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable


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

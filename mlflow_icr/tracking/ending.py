"""How a run ends that nobody ended: by an exception that left the program, by a signal, or by the program's end."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
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


def end_at_exit(close: Callable[[str], object], *, otherwise: str = "FINISHED") -> Callable[[], None]:
    """Call `close(status)` when the interpreter ends; returns what takes that back.

    An exception that nobody caught has gone through the interpreter by then, and is what the status comes from. Without one,
    and after `sys.exit`, which has not, it is `otherwise`. Register it after MLflow was imported, which ends its active run at
    exit as FINISHED: the last that registers is the first that is called. A forked child calls nothing.
    """
    before, process = getattr(sys, "last_value", None), os.getpid()

    def end() -> None:
        if os.getpid() != process:
            return
        error = getattr(sys, "last_value", None)
        close(otherwise if error is None or error is before else status_of(error))

    atexit.register(end)
    return lambda: atexit.unregister(end)


def exit_on_sigterm() -> Callable[[], None]:
    """Have SIGTERM end the program as `sys.exit(143)` does, where nobody else handles it; returns what takes that back.

    By default it ends a process without its exit handlers, and a run would stay RUNNING. In the main thread only: elsewhere it
    does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return lambda: None

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)

    def undo() -> None:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is leave:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    return undo

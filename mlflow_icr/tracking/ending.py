"""End a run with the program: after an uncaught exception, a signal, or a normal exit."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


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
    """Call `close(status)` when the interpreter exits; returns a function that cancels this.

    The status follows from an uncaught exception. Without one, and after `sys.exit`, it is `otherwise`. Register this after
    MLflow was imported: MLflow ends its active run at exit as FINISHED, and exit handlers run in reverse order. A forked child
    calls nothing.
    """
    before, process = getattr(sys, "last_value", None), os.getpid()

    def end() -> None:
        if os.getpid() != process:
            return
        error = getattr(sys, "last_value", None)
        try:
            close(otherwise if error is None or error is before else status_of(error))
        except OSError as failure:  # such as of a folder that was removed
            logger.warning("the run is not ended in its folder (%s)", failure)

    atexit.register(end)
    return lambda: atexit.unregister(end)


def exit_on_sigterm() -> Callable[[], None]:
    """Make SIGTERM end the program as `sys.exit(143)` does, unless it has a handler; returns a function that cancels this.

    By default SIGTERM skips exit handlers, and a run would stay RUNNING. Works in the main thread only; in others it does
    nothing.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, _leave):
        return lambda: None
    signal.signal(signal.SIGTERM, _leave)
    user = object()
    _users.append(user)

    def undo() -> None:
        if user in _users:
            _users.remove(user)
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and not _users and signal.getsignal(signal.SIGTERM) is _leave:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    return undo


_users: list[object] = []  # runs that SIGTERM ends


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)

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

    The status follows from an uncaught exception, or a signal of `exit_on_signals`. Without one, and after `sys.exit`, it is
    `otherwise`. Register this after MLflow was imported: MLflow ends its active run at exit as FINISHED, and exit handlers run
    in reverse order. A forked child calls nothing.
    """
    before, process = getattr(sys, "last_value", None), os.getpid()

    def end() -> None:
        if os.getpid() != process:
            return
        error = getattr(sys, "last_value", None)
        try:
            close("KILLED" if _received else otherwise if error is None or error is before else status_of(error))
        except OSError as failure:  # such as of a folder that was removed
            logger.warning("the run is not ended in its folder (%s)", failure)

    atexit.register(end)
    return lambda: atexit.unregister(end)


def exit_on_signals() -> Callable[[], None]:
    """Make SIGTERM and SIGHUP end the program as `sys.exit(128 + signal)` does, unless they have handlers or are ignored.

    By default they skip exit handlers, and a run would stay RUNNING. A closed terminal sends SIGHUP, which nohup ignores.
    Returns a function that cancels this. Works in the main thread only; in others it does nothing.
    """
    in_main = threading.current_thread() is threading.main_thread()
    numbers = [number for number in SIGNALS if in_main and signal.getsignal(number) in (signal.SIG_DFL, _leave)]
    if not numbers:
        return lambda: None
    for number in numbers:
        signal.signal(number, _leave)
    user = object()
    _users.append(user)

    def undo() -> None:
        if user in _users:
            _users.remove(user)
        in_main = threading.current_thread() is threading.main_thread()
        for number in SIGNALS if in_main and not _users else ():
            if signal.getsignal(number) is _leave:
                signal.signal(number, signal.SIG_DFL)

    return undo


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
_users: list[object] = []  # runs that these signals end
_received: list[int] = []  # signals that have ended the program


def _leave(number: int, frame: object) -> None:
    _received.append(number)
    raise SystemExit(128 + number)

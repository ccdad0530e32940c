"""A lock on a folder or file, for one process at a time. It ends with that process; its children do not hold it."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from filelock import FileLock, Timeout

_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """Held from the construction to `release`. Raises ValueError, whose text is `why`, where another one holds it.

    A forked child does not hold it: without that, a worker would keep the lock of its parent that was killed.
    """

    def __init__(self, path: Path, why: str) -> None:
        self._lock = FileLock(path, timeout=0, is_singleton=False, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(why) from None
        _HELD.add(self)

    def release(self) -> None:
        """Release the lock. Does nothing the second time."""
        _HELD.discard(self)
        self._lock.release()

    def _forget(self) -> None:
        """In a forked child: close the file without unlocking, which would release the parent's lock."""
        descriptor = self._lock._context.lock_file_fd
        if descriptor is not None:
            os.close(descriptor)
            self._lock._context.lock_file_fd = None


def _forget_all() -> None:
    for lock in list(_HELD):
        lock._forget()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)

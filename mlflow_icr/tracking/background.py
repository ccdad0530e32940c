"""A thread that does what it is told, in order, while the one that tells it goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Background:
    """One thread for calls that nobody waits for, and for those that somebody does; all of them in order.

    What a call that nobody waited for has raised is raised from the next `later`, or from `settle`. The end of the program
    waits for all calls; one that comes after that (an exit handler's) is made at once, where it is asked for.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._failure: Exception | None = None

    def later(self, call: Callable[[], object]) -> None:
        """Have a call made soon. Raises what an earlier one has raised; this one is made all the same."""
        failure, self._failure = self._failure, None
        try:
            self._pool.submit(self._attempt, call)
        except RuntimeError:  # the program ends: the pool has made all its calls, and takes no more
            self._attempt(call)
        if failure is not None:
            raise failure

    def now(self, call: Callable[[], T]) -> T:
        """The result of a call that is made when all earlier ones are done. Raises what it raises."""
        try:
            waiting = self._pool.submit(call)
        except RuntimeError:
            return call()
        return waiting.result()

    def settle(self) -> None:
        """Wait until everything is done. Raises what a call has raised that nobody waited for."""
        self.now(lambda: None)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def stop(self) -> None:
        """Make no more calls in the thread."""
        self._pool.shutdown()

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # of whatever kind: it is told of, by the next call
            self._failure = error

"""A check: its result in one line, and what to do about it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

OK, WARN, BAD = "ok", "warn", "bad"


@dataclass(frozen=True)
class Check:
    """A name, a state (ok, warn or bad), what was found, and what to do if it is not ok."""

    name: str
    state: str
    text: str
    mend: str = ""

    @property
    def line(self) -> str:
        """The check as one line of a terminal."""
        mend = f"; {self.mend}" if self.mend else ""
        return f"{self.state:<4}  {self.name}: {self.text}{mend}"


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """A context that hides what libraries print and warn while they are tried."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def carried_out(name: str, check: Callable[[], Iterable[Check]]) -> list[Check]:
    """The results of a check; an unexpected failure is a bad result, and does not stop the others."""
    try:
        with quietly():
            return list(check())
    except Exception as error:  # a broken library may raise anything when it is imported
        return [Check(name, BAD, first_line(error), "the package named there does not work; install it again")]

"""Command lines with errors of one line, which says what is allowed. Loads nothing else of the package."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn


def refuse_unknown(kind: str, name: str, known: list[str]) -> None:
    """Raise ValueError, which proposes the nearest allowed name, unless `known` holds `name`."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{kind} is {name!r}{hint}; expected one of {', '.join(known)}")


def dashed(arguments: Iterable[str]) -> list[str]:
    """Arguments with their flags in dashes: `mlflow run -P num_images=64` hands on --num_images."""
    parts = (argument.partition("=") for argument in arguments)
    return [(flag.replace("_", "-") if flag.startswith("--") else flag) + equals + value for flag, equals, value in parts]


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage, and which knows --num_images and --num-images alike."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse; the error for an unknown flag names the nearest known one."""
        flags = dashed(sys.argv[1:] if args is None else args)
        parsed, unknown = self.parse_known_args(flags, namespace)
        if unknown:
            parser = self._chosen(flags)
            known_flags = sorted(option[2:] for option in parser._option_string_actions if option.startswith("--"))
            if unknown[0].startswith("--"):
                try:
                    refuse_unknown("flag", unknown[0].split("=", 1)[0].lstrip("-"), known_flags)
                except ValueError as error:
                    parser.error(str(error))
            parser.error(f"unexpected {' '.join(unknown)}")
        for name, value in vars(parsed).items():
            if isinstance(value, Path):  # a shell leaves --data=~/photos as it is
                setattr(parsed, name, value.expanduser())
        return parsed

    def _chosen(self, arguments: Iterable[str]) -> argparse.ArgumentParser:
        """The parser of the given command, or this one where there are no commands."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return next((action.choices[argument] for argument in arguments if argument in action.choices), self)
        return self

"""Command lines whose errors are one line that says what is allowed. Loads nothing else of the package."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


def refuse_unknown(kind: str, name: str, known: list[str]) -> None:
    """Raise ValueError, with the nearest of what is allowed, unless `known` holds `name`."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{kind} is {name!r}{hint}; expected one of {', '.join(known)}")


def _dashed(argument: str) -> str:
    """A flag in dashes, its value as it is."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if argument.startswith("--") else argument


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage, and which knows --num_images and --num-images alike."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse; `mlflow run -P num_images=64` hands on --num_images."""
        flags = [_dashed(argument) for argument in (sys.argv[1:] if args is None else args)]
        parsed, unknown = self.parse_known_args(flags, namespace)
        if unknown:
            parser = self._chosen(flags)
            known = sorted(option[2:] for option in parser._option_string_actions if option.startswith("--"))
            if unknown[0].startswith("--"):
                try:
                    refuse_unknown("flag", unknown[0].split("=", 1)[0].lstrip("-"), known)
                except ValueError as error:
                    parser.error(str(error))
            parser.error(f"unexpected {' '.join(unknown)}")
        return parsed

    def _chosen(self, arguments: Iterable[str]) -> argparse.ArgumentParser:
        """The parser of the command that is given, where there are commands."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return next((action.choices[argument] for argument in arguments if argument in action.choices), self)
        return self

"""The command line of a training: a flag for every option, parsed by jsonargparse; an error is one line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from mlflow_icr.arguments import dashed, refuse_unknown
from trainers.config import GROUPS, OPTIONS, TrainConfig, preset_names
from trainers.options import Option, is_required

EXAMPLE = """example:
  python -m trainers.train --data photos/ --output-dir run --total-kimg 500
"""
USAGE = "python -m trainers.train --output-dir DIR [--preset NAME] [--data DATA] [flags]"
METAVARS = {int: "N", float: "X", bool: "true|false", str: "TEXT"}


class CommandLine(ArgumentParser):  # type: ignore[misc]
    """A parser with one-line errors that takes --num_images and --num-images alike.

    An option of several values takes them separated by commas or by spaces: --block-channels 32,64.
    """

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {self._line(message)}\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None, **others: Any) -> Any:  # type: ignore[override]
        """Parse; the error for an unknown flag names the nearest known one."""
        flags = dashed(sys.argv[1:] if args is None else args)
        return super().parse_args(list(self._bracketed(flags)), namespace, **others)

    def _line(self, message: str) -> str:
        if unknown := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
            if not unknown[1].startswith("--"):
                return f"unexpected {unknown[1]}"
            known = sorted(option[2:] for option in self._option_string_actions if option.startswith("--"))
            try:
                refuse_unknown("flag", unknown[1].split()[0].split("=", 1)[0].lstrip("-"), known)
            except ValueError as error:
                return str(error)
        if missing := re.match(r"the following arguments are required: (.*)", message):
            return f"{missing[1]} is not given"
        key, value = re.match(r'Parser key "(\w+)"', message), re.search(r"(?:Got|Given) value: (.*)", message)
        if key and value and key[1] in OPTIONS:
            return f"{key[1]} is {value[1]!r}; expected {OPTIONS[key[1]].kind_in_words()}"
        if key and value:
            return f"{key[1]} is {value[1]!r}; expected {'a whole number' if 'int' in message else 'another value'}"
        return " ".join(message.split())

    def _bracketed(self, flags: Iterable[str]) -> Iterator[str]:
        """Values separated by commas or spaces, as the lists that jsonargparse reads."""
        remaining = list(flags)
        while remaining:
            argument = remaining.pop(0)
            flag, equals, value = argument.partition("=")
            entry = OPTIONS.get(flag[2:].replace("-", "_")) if flag.startswith("--") else None
            if entry is None or not entry.is_tuple:
                yield argument
                continue
            values = [value] if equals else []
            while remaining and not equals and not remaining[0].startswith("--"):
                values.append(remaining.pop(0))
            yield f"{flag}=[{','.join(values)}]" if values else flag


def metavar_of(entry: Option) -> str:
    """The placeholder of an option's value in `--help`."""
    if entry.is_tuple:
        return "X,Y,..."
    return "|".join(filter(None, entry.rules["one_of"])) or METAVARS[entry.kind]


def add_config_flags(parser: ArgumentParser) -> None:
    """Add a flag for every option, in groups; a flag that is not given leaves the value of the preset or of the plan."""
    for name, kind in GROUPS.items():
        group = parser.add_argument_group(name, " ".join((kind.__doc__ or "").split()))
        for entry in (entry for entry in OPTIONS.values() if entry.group == name):
            default = "" if is_required(entry) else f"; default {entry.shown(entry.default) or 'empty'}"
            options: dict[str, Any] = {"nargs": "?", "const": True} if entry.hint is bool else {}
            group.add_argument(
                f"--{entry.name.replace('_', '-')}",
                type=entry.hint,
                default=argparse.SUPPRESS,
                metavar=metavar_of(entry),
                help=(entry.rules["text"] + default).replace("%", "%%"),
                **options,
            )


def config_changes(arguments: Any) -> dict[str, Any]:
    """The options that were given as flags, by name."""
    return {key: value for key, value in vars(arguments).items() if key in OPTIONS}


def config_flags(config: TrainConfig) -> list[str]:
    """A configuration as flags, one for every option, and its preset; `config_changes` reads them again."""
    shown = {name: entry.shown(config.get(name)) for name, entry in OPTIONS.items()}
    flags = [f"--{name.replace('_', '-')}={text}" for name, text in shown.items()]
    return [f"--preset={config.preset}", *flags] if config.preset else flags


def train_parser() -> CommandLine:
    """The command line of `python -m trainers.train`."""
    parser = CommandLine(
        prog="trainers.train",
        usage=USAGE,
        description="Train a diffusion model on images, and measure whether it still learns or has begun to copy them.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output-dir", required=True, metavar="DIR", help="folder for history.jsonl, checkpoints/, config.yaml and more"
    )
    preset = f"take values that no flag gives from this preset: {', '.join(preset_names())}"
    parser.add_argument("--preset", metavar="NAME", help=preset)
    parser.add_argument("--config", metavar="FILE", help="take values that no flag gives from this config.yaml")
    resume = "continue from the last checkpoint in the output folder; auto: begin a run if there is none"
    parser.add_argument("--resume", nargs="?", const="yes", default="no", metavar="auto", help=resume)
    parser.add_argument("--run-name", metavar="NAME", help="name of the new MLflow run")
    parser.add_argument(
        "--on-verdict", metavar="COMMAND", help="command, or URL of a webhook, to tell when the verdict changes"
    )
    parser.add_argument(
        "--register",
        metavar="NAME",
        help="registered model whose alias keep is given to the checkpoint to keep",
    )
    parser.add_argument(
        "--num-processes", type=int, default=1, metavar="N", help="number of processes (ranks) to start; default 1"
    )
    parser.add_argument(
        "--tag", action="append", default=[], metavar="KEY=VALUE", help="tag of the MLflow run; may be repeated"
    )
    add_config_flags(parser)
    return parser


def parse_tags(pairs: Sequence[str]) -> dict[str, str]:
    """A dictionary from KEY=VALUE texts. Raises ValueError for a text without a key or without an equals sign."""
    tags = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ValueError(f"tag is {pair!r}; expected KEY=VALUE")
        tags[key] = value
    return tags

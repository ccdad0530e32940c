"""Flags: one for every field of the configuration, typed by it; an error is one line that names what is allowed."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import Any, get_args, get_type_hints

from mlflow_icr.arguments import OneLineParser
from trainers.config import TrainConfig, preset_names


def _whole(text: str) -> int:
    value = float(text)
    if value != int(value):
        raise ValueError
    return int(value)


def _truth(text: str) -> bool:
    choices = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    return choices[text.lower()]


def _several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(kind(part) for part in text.split(",") if part)


def converter(name: str, hint: Any) -> Callable[[str], Any]:
    """Text to a field's type, with an error that names the field."""
    inner = get_args(hint)
    kinds: dict[Any, tuple[Callable[[str], Any], str]] = {
        int: (_whole, "a whole number"),
        float: (float, "a number"),
        bool: (_truth, "true or false"),
        str: (str, "text"),
    }
    convert, allowed = kinds[inner[0] if inner else hint]
    if inner:
        convert, allowed = _several(convert), f"{allowed.removeprefix('a ')}s separated by commas"

    def checked(text: str) -> Any:
        try:
            return convert(text)
        except (ValueError, KeyError, OverflowError):
            raise argparse.ArgumentTypeError(f"{name} is {text!r}; expected {allowed}") from None

    return checked


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for every field of TrainConfig but the preset; a flag that is not given leaves the preset's value."""
    hints = get_type_hints(TrainConfig)
    group = parser.add_argument_group("configuration", "each replaces the preset's value")
    for field in fields(TrainConfig):
        if field.name == "preset":
            continue
        hint = hints[field.name]
        default = "" if field.default is MISSING else f"default {field.default}, unless the preset says otherwise"
        options: dict[str, Any] = {"nargs": "?", "const": True} if hint is bool else {}
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=converter(field.name, hint),
            default=argparse.SUPPRESS,
            metavar="X" if not isinstance(hint, types.GenericAlias) else "X,Y,...",
            help=default,
            **options,
        )


def config_changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The configuration fields that were given as flags."""
    names = {field.name for field in fields(TrainConfig)} - {"preset"}
    return {key: value for key, value in vars(arguments).items() if key in names}


def config_flags(config: TrainConfig) -> list[str]:
    """The flags of a configuration's every field: what `config_changes` takes apart again, preset included."""
    flags = []
    for key, value in config.as_dict().items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        flags.append(f"--{key.replace('_', '-')}={text}")
    return flags


def train_parser() -> OneLineParser:
    """The command line of `python -m trainers.train`."""
    parser = OneLineParser(
        prog="trainers.train", description="Train a diffusion model on limited data, with ICR.", allow_abbrev=False
    )
    parser.add_argument("--preset", help=f"one of {', '.join(preset_names())}")
    parser.add_argument("--output-dir", required=True, help="folder for history.jsonl, checkpoints/, tensorboard/, config.yaml")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--run-name", help="name of a new MLflow run")
    parser.add_argument("--num-processes", type=converter("num_processes", int), default=1, metavar="N", help="ranks to start")
    parser.add_argument("--tag", action="append", default=[], metavar="KEY=VALUE", help="a tag of the MLflow run; repeatable")
    add_config_flags(parser)
    return parser


def parse_tags(pairs: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE texts as a dictionary. Raises ValueError for text without a key and an equals sign."""
    tags = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ValueError(f"tag is {pair!r}; expected KEY=VALUE")
        tags[key] = value
    return tags

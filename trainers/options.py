"""Fields of a configuration: each with a sentence, what it may be, and a flag; a group of them checks itself."""

from __future__ import annotations

import math
from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentParser

FAMILIES = ("edm", "ddpm", "flow")
UNET, TRANSFORMER = NETWORKS = ("U-Net", "transformer")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def option(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    one_of: tuple[str, ...] = (),
    families: tuple[str, ...] = FAMILIES,
    network: str = "",
    flag: str = "",
) -> Any:
    """A field: its default, the sentence that `--help` shows, and the values that it may have.

    Numbers are finite, at least `least`, over `above` and under `below`; texts are `one_of`; None is allowed where the type
    says so. `families` are those that use it, and `network` is the one of NETWORKS that does, if not both: with another one,
    any value but the default is refused. `flag` is its name on the command line, in flat mappings and in errors, if that is
    not the field's own.
    """
    rules = {"text": text, "least": least, "above": above, "below": below, "one_of": one_of, "flag": flag}
    return field(default=default, metadata=rules | {"families": families, "network": network})


def required(text: str, **rules: Any) -> Any:
    """A field without a default: its value comes from a preset, a file, a flag, or the plan for the data."""
    return field(metadata=option(None, text, **rules).metadata)


@dataclass(frozen=True)
class Option:
    """An option: its flat name, the field that holds it, its type, and the values that it may have."""

    name: str  # flat: the flag's, with underscores
    group: str  # empty for a field of the configuration itself
    attribute: str
    hint: Any
    default: Any  # MISSING where it is required
    rules: Mapping[str, Any] = field(hash=False)

    @property
    def path(self) -> str:
        """The key in a file, group and attribute with a dot between."""
        return f"{self.group}.{self.attribute}" if self.group else self.attribute

    @property
    def is_tuple(self) -> bool:
        """Whether it holds several values."""
        return str(self.hint).startswith("tuple")

    @property
    def kind(self) -> type:
        """The type of its value, or of each of them."""
        return next((kind for kind in get_args(self.hint) if kind in KINDS), self.hint) if get_args(self.hint) else self.hint

    def unused_by(self, family: str, network: str) -> str:
        """Why a model of a family with one of NETWORKS makes no use of it; empty where it does."""
        families, needed = self.rules["families"], self.rules["network"]
        if family not in families:
            return f"nothing for family {family}: it is of {' and '.join(families)}"
        return "" if needed in ("", network) else f"nothing for a {network}: it is of a {needed}"

    def kind_in_words(self) -> str:
        """The type of its value, in words."""
        return f"{KINDS[self.kind].removeprefix('a ')}s separated by commas" if self.is_tuple else KINDS[self.kind]

    def shown(self, value: Any) -> str:
        """A value as one types it after a flag."""
        if value is None:
            return "null"
        if isinstance(value, bool):
            return str(value).lower()
        return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)

    def typed(self, value: Any) -> Any:
        """A value from a file or a text, converted to the option's type by jsonargparse. Raises ValueError for another type."""
        if type(value) is self.hint:
            return value
        if value is None and type(None) not in get_args(self.hint):
            refuse(self.name, value, self.kind_in_words())
        if isinstance(value, str) and self.is_tuple:
            value = f"[{value}]"
        try:
            return getattr(_parser(self).parse_object({self.attribute: value}), self.attribute)
        except ArgumentError:
            raise ValueError(f"{self.name} is {value!r}; expected {self.kind_in_words()}") from None

    def allowed(self) -> str:
        """The values that it may have, in words."""
        rules = self.rules
        if self.is_tuple:
            return self.kind_in_words()
        if one_of := rules.get("one_of"):
            return "one of " + ", ".join(filter(None, one_of)) + (", or empty" if "" in one_of else "")
        words, least, above, below = KINDS[self.kind], rules.get("least"), rules.get("above"), rules.get("below")
        if above == 0 and below is None:
            words = words.replace("a ", "a positive ", 1)
        elif below is not None:
            words += f" in {'(' if least is None else '['}{above if least is None else least:g}, {below:g})"
        elif least is not None:
            words += f" >= {least:g}"
        return words + (", or null" if type(None) in get_args(self.hint) else "")

    def accepts(self, value: Any) -> bool:
        """Whether a value of the right type is allowed."""
        rules = self.rules
        if rules.get("one_of"):
            return value in rules["one_of"]
        if value is None or isinstance(value, str) or self.is_tuple or self.kind not in (int, float):
            return True
        least, above, below = rules.get("least"), rules.get("above"), rules.get("below")
        return (
            math.isfinite(value)
            and (least is None or value >= least)
            and (above is None or value > above)
            and (below is None or value < below)
        )


def network_of(family: str, transformer: bool) -> str:
    """The kind of network of a family's model, one of NETWORKS; `transformer` is the option of that name."""
    return TRANSFORMER if transformer or family == "flow" else UNET


def used_values(values: Mapping[str, Any], options: Mapping[str, Option], family: str, transformer: bool) -> dict[str, Any]:
    """The values by flat name that a model of a family makes use of, and those that are no options."""
    network = network_of(family, transformer)
    return {key: value for key, value in values.items() if key not in options or not options[key].unused_by(family, network)}


@cache
def _parser(entry: Option) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{entry.attribute}", type=entry.hint)
    return parser


def options_of(kind: type, group: str = "") -> list[Option]:
    """The options of a dataclass, in its order; fields that are no options are left out."""
    hints = get_type_hints(kind)
    return [
        Option(entry.metadata["flag"] or entry.name, group, entry.name, hints[entry.name], entry.default, entry.metadata)
        for entry in fields(kind)
        if "text" in entry.metadata
    ]


def refuse(name: str, value: Any, allowed: str) -> None:
    """Raise ValueError naming a field, its value and what is allowed."""
    raise ValueError(f"{name} is {value!r}; expected {allowed}")


class Group:
    """Base of frozen dataclasses of options: floats from whole numbers, tuples from lists, and ValueError for other values."""

    def __post_init__(self) -> None:
        for entry in options_of(type(self)):
            value = getattr(self, entry.attribute)
            if entry.kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            elif isinstance(value, list):
                value = tuple(value)
            object.__setattr__(self, entry.attribute, value)
            if not entry.accepts(value):
                refuse(entry.name, value, entry.allowed())


def is_required(entry: Option) -> bool:
    """Whether a configuration must give it."""
    return entry.default is MISSING

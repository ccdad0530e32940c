"""The catalogue of metrics: what each key means, its formula and source, when it is absent, and what it costs.

The entries are in `catalogue.yaml`. Reports, trackers and the site read them; a test holds them against the keys of a real run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Metric:
    """One metric, or several with a common stem: `key` may hold `<encoder>`, and `parts` are what is added to it."""

    key: str
    group: str
    definition: str
    formula: str
    source: str
    absent: str
    cost: str
    parts: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The key and those with its parts."""
        return (self.key, *(self.key + part for part in self.parts))

    def names(self, key: str) -> bool:
        """Whether a recorded key is this metric's."""
        return any(re.fullmatch(_pattern(own), key) for own in self.keys)


def _pattern(key: str) -> str:
    """A key as a regular expression: of any encoder, at any noise level, of averaged or raw weights."""
    text = re.escape(key).replace("<encoder>", r"[a-z0-9_.-]+").replace("<value>", r"[0-9.e+-]+")
    if not key.startswith("repr/"):
        return text
    return text.replace("repr/", r"repr(_raw|_class)?(_sigma[0-9.e+-]+)?/", 1) + r"(_x[0-9.e+-]+)?"


@cache
def catalogue() -> tuple[Metric, ...]:
    """All metrics, group by group."""
    import yaml

    groups = yaml.safe_load((Path(__file__).parent / "catalogue.yaml").read_text())
    return tuple(
        Metric(**{**entry, "group": group, "parts": tuple(entry.get("parts", ()))})
        for group, entries in groups.items()
        for entry in entries
    )


def metric_of(key: str) -> Metric | None:
    """The catalogue's entry of a recorded key, the most specific one; None for a key from elsewhere."""
    return max((metric for metric in catalogue() if metric.names(key)), key=lambda metric: len(metric.key), default=None)


def catalogue_page() -> str:
    """The catalogue as a page of the site, Markdown."""
    lines = [
        "# Metrics",
        "",
        "This page lists every metric that is logged, with its formula, source and cost.",
        "The step of every metric is images seen. An absent value is left out, and its reason is logged once.",
        "",
        "A key with `_low` and `_high` has the bounds of a 95 % interval. `repr_sigma<value>/` are further noise levels.",
        "`repr_raw/` is the network without averaging, `repr_class/` the network told each image's own class.",
        "An end such as `_x0.5` is a multiple of the monitored noise level.",
        "",
    ]
    group = ""
    for metric in catalogue():
        lines += [] if metric.group == group else [f"## {metric.group}", ""]
        group = metric.group
        lines += [f"### `{metric.key}`", "", metric.definition, "", "| | |", "|---|---|"]
        lines += [f"| formula | {metric.formula.replace('|', chr(92) + '|')} |", f"| source | {metric.source} |"]
        lines += [f"| absent | {metric.absent} |", f"| cost | {metric.cost} |"]
        lines += [f"| also | {', '.join(f'`{key}`' for key in metric.keys[1:])} |"] if metric.parts else []
        lines += [""]
    return "\n".join(lines)

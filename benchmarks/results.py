"""The results of benchmarks in one file, and the page of them.

A benchmark calls `keep`, which writes where BENCHMARK_RESULTS names a file, and nowhere else: `make benchmarks` sets it.
`python -m benchmarks.results` then writes docs/benchmarks.md from docs/benchmarks.json and docs/benchmarks.template.md.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS, TEMPLATE, PAGE = (DOCS / f"benchmarks{ending}" for ending in (".json", ".template.md", ".md"))
VARIABLE = "BENCHMARK_RESULTS"
FIELD = re.compile(r"\{\{(\w+)(?::([^}]+))?\}\}")


def machine() -> str:
    """This machine in words."""
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    python, torch = (".".join(text.split(".")[:2]) for text in (platform.python_version(), version("torch")))
    return f"{os.cpu_count()} cores ({platform.machine()}), {gibibytes:.0f} GiB, Python {python}, torch {torch}"


def keep(**values: float) -> None:
    """Write values by name, to four digits and with today's date, into the file that the variable names, if it is set.

    Results of another machine in it are dropped.
    """
    place = os.environ.get(VARIABLE)
    if not place:
        return
    path = Path(place)
    this_machine = machine()
    content = json.loads(path.read_text()) if path.exists() else {}
    if content.get("machine") != this_machine:
        content = {"results": {}}
    today = time.strftime("%Y-%m-%d", time.gmtime())
    content["results"] |= {name: {"value": float(f"{value:.4g}"), "date": today} for name, value in values.items()}
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(content["results"].items()))
    path.write_text(f'{{\n  "machine": {json.dumps(this_machine)},\n  "results": {{\n{lines}\n  }}\n}}\n')


def page_of(template: str, content: Mapping[str, object]) -> str:
    """The template with `{{name:format}}` as that result, `{{machine}}`, and `{{dates}}` as first and last date.

    Raises KeyError for a result that is missing.
    """
    results: dict[str, dict[str, object]] = content["results"]  # type: ignore[assignment]
    dates = sorted({str(entry["date"]) for entry in results.values()})
    texts = {"machine": str(content["machine"]), "dates": dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"}

    def text_of(match: re.Match[str]) -> str:
        name, form = match[1], match[2]
        return texts[name] if form is None else format(results[name]["value"], form)

    return FIELD.sub(text_of, template)


if __name__ == "__main__":
    PAGE.write_text(page_of(TEMPLATE.read_text(), json.loads(RESULTS.read_text())))

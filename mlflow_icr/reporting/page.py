"""The whole page: one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from mlflow_icr.reporting.comparison import comparison
from mlflow_icr.reporting.markup import Child, Markup, element, joined
from mlflow_icr.reporting.material import RunMaterial
from mlflow_icr.reporting.sections import PICTURES_OF_A_RUN, method_section, run_section
from mlflow_icr.reporting.style import STYLE
from mlflow_icr.version import __version__

# All pictures together; base64 adds a third, charts and tables some hundred kilobytes a run: under 10 MB in all.
PICTURE_BYTES = 6 * 2**20
MOST_DETAILED = 12  # runs with a section of their own; with more, a page would be too long to read and to load
SCRIPT = (Path(__file__).parent / "page.js").read_text()
# Nothing may be loaded, and only the page's own script may run, even if a name or picture from a store contains code.
POLICY = (
    f"default-src 'none'; script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'; "
    "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)


def page(title: str, runs: Sequence[RunMaterial], notes: Sequence[str] = ()) -> str:
    """The HTML text of a report on runs; those without an ICR are named as such."""
    measured = [run for run in runs if run.measured]
    others = [run for run in runs if not run.measured]
    detailed = measured[:MOST_DETAILED]
    links = [f"run-{place}" if place <= len(detailed) else "" for place in range(1, len(measured) + 1)]
    most_bytes = PICTURE_BYTES // (PICTURES_OF_A_RUN * max(1, len(detailed)))
    alone = len(measured) == 1
    remarks = [*notes, *_unmeasured(others)]
    if len(measured) > len(detailed):
        remarks.append(f"The first {len(detailed)} of {len(measured)} runs have sections of their own; name others for theirs.")
    sections = [
        run_section(run, link, most_bytes, opened=place < 2, alone=alone)
        for place, (run, link) in enumerate(zip(detailed, links, strict=False))
    ]
    parts: list[Child] = [
        element(
            "header",
            element("button", "Light or dark", type="button", class_="theme", hidden=True),
            element("h1", title),
            element("p", "Does the model still learn, or does it copy its training images? ", _counted(runs), class_="quiet"),
        ),
        [element("p", note, class_="quiet") for note in remarks],
    ]
    if len(measured) > 1:
        parts.append(element("section", element("h2", "Runs side by side"), comparison(measured, links), id="comparison"))
        parts.append(element("h2", "Each run"))
    parts.append(sections)
    if not measured:
        parts.append(element("p", "None of these runs has a measurement of ICR: there is nothing to report.", class_="warning"))
    parts.append(element("section", element("h2", "How this was computed"), method_section(), id="method"))
    parts.append(_footer())
    return _document(title, joined(parts))


def _counted(runs: Sequence[RunMaterial]) -> str:
    if len(runs) != 1:
        return f"{len(runs)} runs."
    return f"{len(runs[0].rows)} measurements."


def _unmeasured(runs: Sequence[RunMaterial]) -> list[str]:
    """A remark that names runs without an ICR, if there are any."""
    if not runs:
        return []
    names = ", ".join(f"{run.name} ({run.place})" for run in runs[:20])
    rest = f" and {len(runs) - 20} more" if len(runs) > 20 else ""
    return [f"Without a measurement of ICR, and so not compared: {names}{rest}."]


def _footer() -> Markup:
    now = time.gmtime()
    written = element(
        "time", time.strftime("%Y-%m-%d %H:%M UTC", now), datetime=time.strftime("%Y-%m-%dT%H:%M:%SZ", now)
    )  # fmt: skip
    text = joined(
        f"Written by mlflow-icr {__version__} at ",
        written,
        ". Point at a number or a dot for its exact value. "
        "Charts: drag to zoom, double-click for the whole; with the keyboard, arrows, + and -, 0 for the whole.",
    )
    return element("footer", element("p", text, class_="quiet"))


def _document(title: str, body: Markup) -> str:
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    script = element("script", Markup(SCRIPT))  # at the end, when the charts are there
    return f"<!DOCTYPE html>\n{element('html', head, element('body', body, script), lang='en')}\n"

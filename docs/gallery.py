"""The gallery in docs/reading.md, from kept histories of real trainings: `python docs/gallery.py` draws and writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_icr import summarise, verdict
from mlflow_icr.monitoring.evidence import NAMES, ratio_key
from mlflow_icr.monitoring.verdict import GENERALIZING, MEMORIZING, TURNING, UNDECIDED

DOCS = Path(__file__).parent
BEGIN, END = "<!-- gallery: python docs/gallery.py writes what follows -->", "<!-- end of the gallery -->"
COLOURS = {UNDECIDED: "#d9d9d9", GENERALIZING: "#cde7d3", TURNING: "#fde0b2", MEMORIZING: "#f6c6c2"}
COPIES = ("mem/ratio_l2", "mem/ratio_l2_low", "mem/ratio_l2_high")
Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Case:
    """A history and what it shows; `until` cuts the history there. `text` may name the keys of `facts`."""

    name: str
    title: str
    history: str
    text: str
    until: int | None = None


CASES = (
    Case(
        "learning",
        "Learning",
        "histories/demo-control.jsonl",
        "This is the demo's control on 1,600 digits, to {end} images seen. ICR falls from {icr_first} to {icr_end}. The "
        "{ratio_name} ends at {ratio_end}: it grows a little, because digits have an upright place. No sample is a copy. The "
        "verdict is *{state}* from {first} on.",
    ),
    Case(
        "turning",
        "Turning",
        "histories/mnist12-n64.jsonl",
        "The training set is 64 images of MNIST. The {ratio_name} bends upward. The verdict is *undecided* for one "
        "measurement, then *turning* from {turning} images seen on. It dates the turn at {turned}. No sample is a copy yet: "
        "the training ended there. This is the moment to stop, or to add data.",
    ),
    Case(
        "copying",
        "Copying",
        "histories/demo-limited.jsonl",
        "This is the demo's limited run on 128 digits. The verdict is *turning* from {turning} images seen on. It is "
        "*memorizing* from {memorizing} on, where two detectors find copies. The share of copies in the last panel ends at "
        "{copies_end}. It stays above 5% from {onset} on; the warning came at {lead} of that. ICR has turned, and rises.",
    ),
    Case(
        "undecided",
        "Undecided",
        "validation/runs/digits-limited-n256-seed1002/history.jsonl",
        "This is a training on 256 digits, as it stood at {end} images seen. The {ratio_name} is {ratio_end} and grows, but "
        "not surely faster than learning explains. The verdict says so, and makes no claim: measure more often. In the whole "
        "history the verdict is *turning* from {later} on.",
        until=48_192,
    ),
    Case(
        "wrong",
        "Wrong: it stays at turning",
        "validation/runs/digits-limited-n64-seed1000/history.jsonl",
        "The training set is 64 digits. The verdict warned at {turning} images seen. Copies begin at {onset}, and at the end "
        "{copies_end} of the samples are copies. The verdict still says *{state}*, because *memorizing* takes two detectors, "
        "and only one was measured. Measure with two detectors or more.",
    ),
    Case(
        "disputed",
        "Disputed: memorizing, and few copies",
        "validation/runs/digits-limited-n512-seed1014/history.jsonl",
        "The training set is 512 digits. The verdict is *memorizing* from {memorizing} images seen on. Two detectors agree: "
        "samples are too near to training images. The third one, distances in the last panel, finds {copies_end} copies even "
        "at the end. If only exact copies count, this is a false alarm.",
    ),
)  # fmt: skip


def history_of(case: Case) -> list[dict[str, float]]:
    """The rows of a case's whole history."""
    return [json.loads(line) for line in (DOCS / case.history).read_text().splitlines()]


def shown_of(case: Case) -> list[dict[str, float]]:
    """The rows that are shown."""
    return [row for row in history_of(case) if case.until is None or row["images_seen"] <= case.until]


def states_of(rows: Rows) -> list[str]:
    """The verdict at each row, from the history up to it."""
    return [verdict(rows[: end + 1]).state for end in range(len(rows))]


def facts(case: Case) -> dict[str, str]:
    """The values that a case's text may name, computed from its history."""
    rows, whole = shown_of(case), history_of(case)
    states, newest, ends = states_of(rows), verdict(rows), summarise(rows)
    at = [int(row["images_seen"]) for row in rows]
    steps = {"end": at[-1], "turned": newest.turned_at, "onset": ends.get("mem_onset_images_seen")}
    steps |= {state: at[states.index(state)] if state in states else None for state in (TURNING, MEMORIZING)}
    steps["first"] = next(step for step, state in zip(at, states, strict=True) if state != UNDECIDED)
    later = states_of(whole)
    steps["later"] = int(whole[later.index(TURNING)]["images_seen"]) if TURNING in later else None
    texts = {key: "never" if value is None else f"{value:,.0f}" for key, value in steps.items()}
    icr = [row["repr/icr_debiased"] for row in rows if "repr/icr_debiased" in row]
    ratio = ratio_key(rows)
    texts |= {"icr_first": f"{icr[0]:.2f}", "icr_end": f"{icr[-1]:.2f}", "state": newest.state, "ratio_name": NAMES[ratio]}
    texts |= {"ratio_end": f"{rows[-1][ratio]:.2f}", "copies_end": f"{rows[-1]['mem/ratio_l2']:.1%}"}
    if steps["onset"] and steps[TURNING]:
        texts["lead"] = f"{steps[TURNING] / steps['onset']:.0%}"
    return texts


def _panel(axes: Any, rows: Rows, keys: Sequence[str], label: str) -> None:
    value, low, high = keys
    points = [row for row in rows if value in row and row["images_seen"] > 0]
    x = [row["images_seen"] / 1000 for row in points]
    axes.plot(x, [row[value] for row in points], color="#1f4e79", marker="o", markersize=2.5, linewidth=1.3)
    if points and low in points[-1]:
        lower, upper = ([row.get(key, row[value]) for row in points] for key in (low, high))
        axes.fill_between(x, lower, upper, color="#1f4e79", alpha=0.2, linewidth=0)
    axes.set_title(label, fontsize=9)


def draw(case: Case, path: Path) -> None:
    """Error ratio, ICR and copies of a case over images seen, on the colours of the verdict there."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in shown_of(case) if row["images_seen"] > 0]
    states = states_of(shown_of(case))[-len(rows) :]
    ratio = ratio_key(rows)
    figure = Figure(figsize=(8.2, 2.3), layout="constrained")
    panels = figure.subplots(1, 3)
    _panel(panels[0], rows, (ratio, f"{ratio}_low", f"{ratio}_high"), NAMES[ratio])
    _panel(panels[1], rows, ("repr/icr_debiased", "repr/icr_low", "repr/icr_high"), "ICR")
    _panel(panels[2], rows, COPIES, "share of copies")
    edges = [row["images_seen"] / 1000 for row in rows]
    for axes in panels:
        axes.set_xscale("log")
        for place, state in enumerate(states):
            right = edges[place + 1] if place + 1 < len(edges) else edges[-1] * 1.08
            axes.axvspan(edges[place], right, color=COLOURS[state], linewidth=0, zorder=0)
        axes.set_xlim(edges[0], edges[-1] * 1.08)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.tick_params(which="both", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[0].yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value in (2, 3, 5, 20, 50) else "")
    panels[2].set_ylim(-0.03, 1.03)
    panels[1].set_xlabel("images seen, thousands", fontsize=8)
    shown = [state for state in COLOURS if state in states]
    patches = [matplotlib.patches.Patch(color=COLOURS[state], label=state) for state in shown]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(shown), fontsize=8, frameon=False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": case.name}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def gallery() -> str:
    """The section of docs/reading.md."""
    parts = []
    for case in CASES:
        text = re.sub(r"\s+", " ", case.text.format(**facts(case)))
        picture = f"![Error ratio, ICR and copies](images/reading-{case.name}.svg)"
        parts.append(f"### {case.title}\n\n{picture}\n\n{text}\n\nHistory: `docs/{case.history}`.\n")
    return f"{BEGIN}\n\n" + "\n".join(parts) + f"\n{END}\n"


def with_gallery(page: str) -> str:
    """The page with the gallery as it is now."""
    before, _, rest = page.partition(BEGIN)
    return before + gallery() + rest.partition(f"{END}\n")[2]


if __name__ == "__main__":
    for case in CASES:
        draw(case, DOCS / "images" / f"reading-{case.name}.svg")
    reading = DOCS / "reading.md"
    reading.write_text(with_gallery(reading.read_text()))

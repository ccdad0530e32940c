"""The study's page, written from its result files by rules: when the verdict came, and when the copies did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow_icr.extraction.files import write_whole
from mlflow_icr.monitoring import verdict
from mlflow_icr.monitoring.verdict import MEMORIZING, TURNING
from studies.fine_tuning.runs import SAMPLES, FineTuning, all_runs

BEFORE = "warned before copies"  # the judgement that is hoped for
COPIES = 0.05  # a share of copies counts when the lower bound of its interval is above this


@dataclass(frozen=True)
class Outcome:
    """When a run's verdict was first turning or memorizing, and when its samples held copies; images seen, None for never."""

    method: str
    num_images: int
    images_seen: int
    state: str
    warned_at: int | None
    copied_at: int | None
    copies_then: float | None
    copies_at_end: float

    @property
    def judgement(self) -> str:
        """The judgement on the verdict, by rule."""
        if self.copied_at is None:
            return "no copies, no warning" if self.warned_at is None else "warned, and no copies by the end"
        if self.warned_at is None:
            return "copies without a warning"
        return BEFORE if self.warned_at < self.copied_at else "warned with the copies or after"


def outcome_of(content: Mapping[str, object]) -> Outcome:
    """The outcome of a run's result file."""
    rows: list[dict[str, float]] = sorted(content["history"], key=lambda row: row["images_seen"])  # type: ignore[arg-type, call-overload]
    shares: list[dict[str, float]] = content["copies"]  # type: ignore[assignment]
    warned = None
    for end in range(1, len(rows) + 1):
        if verdict(rows[:end]).state in (TURNING, MEMORIZING):
            warned = int(rows[end - 1]["images_seen"])
            break
    copied = next((int(row["images_seen"]) for row in shares if row["low"] > COPIES), None)
    copies_then = next((row["copies"] for row in shares if row["images_seen"] == warned), None)
    return Outcome(
        str(content["method"]),
        int(str(content["num_images"])),
        int(rows[-1]["images_seen"]),
        verdict(rows).state,
        warned,
        copied,
        copies_then,
        shares[-1]["copies"],
    )


def read_outcomes(results: Path) -> list[Outcome]:
    """The outcomes of all result files: first those with another judgement than hoped, then by method and number of images."""
    outcomes = [outcome_of(json.loads(path.read_text())) for path in results.glob("*.json")]
    return sorted(outcomes, key=lambda outcome: (outcome.judgement == BEFORE, outcome.method, outcome.num_images))


def _number(value: int | None) -> str:
    return "never" if value is None else f"{value:,}"


def _row(o: Outcome) -> str:
    method = {"full": "full fine-tuning", "lora": "LoRA"}[o.method]
    then = "" if o.copies_then is None else f"{o.copies_then:.0%}"
    end = f"{o.copies_at_end:.0%} at {o.images_seen:,}"
    cells = (method, o.num_images, _number(o.warned_at), then, _number(o.copied_at), end, o.state, o.judgement)
    return f"| {' | '.join(map(str, cells))} |"


def _missing(outcomes: Sequence[Outcome], planned: Sequence[FineTuning]) -> str:
    """A paragraph on the planned runs that have no result, empty where all have one."""
    measured = {(outcome.method, outcome.num_images) for outcome in outcomes}
    names = [run.name for run in planned if (run.method, run.num_images) not in measured]
    if not names:
        return ""
    return f"""
**Not done yet: {", ".join(names)}.** The command continues with them. This page says nothing about them.
"""


def page_of(outcomes: Sequence[Outcome], planned: Sequence[FineTuning] = ()) -> str:
    """The page, Markdown; `planned` runs without an outcome are named on it."""
    rows = [_row(outcome) for outcome in outcomes]
    judgements = list(dict.fromkeys(outcome.judgement for outcome in outcomes))  # in the order of the table
    counts = {text: sum(outcome.judgement == text for outcome in outcomes) for text in judgements}
    summary = "; ".join(f"{text}: {count} of {len(outcomes)}" for text, count in counts.items())
    return f"""# Fine-tuning and LoRA, watched from beside

This page shows for fine-tunings of one small model whether the verdict came before the copies. `python -m studies.fine_tuning`
writes it from the files in `docs/validation/fine_tuning/`.

A small U-Net (8x8 pixels) is trained on nine classes of CIFAR-10, and then fine-tuned on 32, 128 or 512 images of the
tenth: all weights, or a LoRA of rank 16. The training script is plain diffusers and PEFT. It knows nothing of this library, and
saves three checkpoints in each doubling of the images seen. `mlflow-icr watch` runs beside it.

A sample is a copy when its nearest training image is less than a third as far away as the second nearest, in pixels.
A run *copies* from the first checkpoint on whose share of copies is above
{COPIES:.0%} with its whole interval; {SAMPLES} samples are drawn of each. It is *warned* at the first checkpoint at which the
verdict is turning or memorizing, read from the measurements up to there. The lengths of the runs were set before the first of
them.

**{summary or "No run is done"}.**
{_missing(outcomes, planned)}
| method | images | warned at | copies then | copies from | copies at the end | last verdict | |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

All positions are images seen. With one seed, one model and one data set, this is a first look, and no validation. The
thresholds of the verdict were found on training from scratch, and nothing was tuned here.
"""


def write_page(results: Path, page: Path) -> None:
    """Write the page from all result files."""
    content = page_of(read_outcomes(results), all_runs()).encode()
    write_whole(page, lambda file: file.write(content))

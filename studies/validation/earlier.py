"""The 52 runs of the study before this one: limited and rich trainings by EDM, with default settings, on grey images.

Their view error ratio is that of ICR's views, which are blurrier than the images, so its level differs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mlflow_icr.monitoring.series import read_history
from studies.validation import tables
from studies.validation.outcomes import LEADING, TWO, Outcome, onsets_of
from studies.validation.rivals import RULES
from studies.validation.rules import with_threshold
from studies.validation.runs import Plan

NAME = re.compile(r"(?P<set>.+)-(?P<role>limited|rich)-n(?P<n>\d+)-seed(?P<seed>\d+)")


def read_earlier(folder: Path, plan: Plan) -> list[Outcome]:
    """Their outcomes, by the distance ratio alone; thresholds were chosen on the digits runs with even seeds."""
    outcomes = []
    for path in sorted(folder.glob("*/")):
        match = NAME.fullmatch(path.name)
        assert match is not None, path
        rows = read_history(path)
        onsets = onsets_of(rows, {LEADING: plan.truth[LEADING]})
        onsets[TWO] = None
        half = match["set"] == "digits" and int(match["seed"]) % 2 == 0
        outcomes.append(Outcome(path.name, {"images": match["set"], "num_images": int(match["n"])}, half, rows, onsets))
    return outcomes


def earlier_table(outcomes: Sequence[Outcome], plan: Plan) -> str:
    """Every rule that has a score in these histories, on the runs that no threshold was chosen on."""
    chosen, judged = ([o for o in outcomes if o.chosen_on is half] for half in (True, False))
    rules = [with_threshold(rule, chosen, LEADING, plan.open_factor) for rule in RULES if tables.has_score(rule, outcomes)]
    return tables.rules_table(rules, judged, plan)


def counts_text(outcomes: Sequence[Outcome]) -> str:
    """How many of them copied, in words."""
    judged = [o for o in outcomes if not o.chosen_on]
    copying = sum(o.onsets[LEADING] is not None for o in judged)
    return f"{len(outcomes)} runs, {len(judged)} of them not chosen on, of which {copying} copied"

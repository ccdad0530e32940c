"""The rules in the table: clocks, the verdicts, and the measures of the literature, each as the monitor logs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mlflow_icr.monitoring.series import Rows, series
from mlflow_icr.monitoring.verdict import MEMORIZING, TURNING, Verdict, VerdictTracker
from studies.validation.outcomes import Outcome
from studies.validation.rules import Rule, Score, epochs, level, log_gap, over_lowest

VERDICT = "**the verdict**"


def verdicts(rows: Rows) -> list[tuple[int, Verdict]]:
    """The verdict at every measurement, from the history up to it."""
    tracker = VerdictTracker()
    return [(int(row["images_seen"]), tracker.add(row)) for row in rows]


def verdict_states(rows: Rows) -> list[tuple[int, str]]:
    """The verdict's state at every measurement, from the history up to it."""
    return [(at, verdict.state) for at, verdict in verdicts(rows)]


def _verdict(outcome: Outcome) -> Score:
    return [(at, float(state in (TURNING, MEMORIZING))) for at, state in verdict_states(outcome.rows)]


def ratio_growth(rows: Rows, key: str = "repr/view_error_ratio") -> list[tuple[int, float, float]]:
    """(images seen, ratio, lower bound of its power of images seen over the last doubling): what the first verdict read."""
    high = dict(series(rows, f"{key}_high"))
    points = [(at, r) for at, r in series(rows, key) if at > 0 and r > 0]
    x, y = (np.log([point[i] for point in points]) for i in (0, 1))
    half = np.array([math.log(high[at] / r) if at in high else 0.0 for at, r in points])
    growths = []
    for end, (end_at, ratio) in enumerate(points):
        start = max(0, int(np.searchsorted(x[end] - x[: end + 1] < math.log(2), True)) - 1)
        if end + 1 - start < 3 or x[end] - x[start] < 0.99 * math.log(2):
            continue
        away = x[start : end + 1] - x[start : end + 1].mean()
        square = float(away @ away)
        reach = math.sqrt(float(((away * half[start : end + 1]) ** 2).sum())) / square
        growths.append((end_at, ratio, float(away @ y[start : end + 1]) / square - reach))
    return growths


def _first_verdict(outcome: Outcome) -> Score:
    """1 where the ratio grew faster than the power 0.6 at a level of 2 or more, or ICR rose by 0.05 for certain."""
    rise = dict(series(outcome.rows, "repr/icr_rise"))
    risen = {at for at, low in series(outcome.rows, "repr/icr_rise_low") if low > 0 and rise.get(at, 0) >= 0.05}
    grown = {at for at, ratio, low in ratio_growth(outcome.rows) if low > 0.6 and ratio > 2}
    return [(at, float(at in risen | grown)) for at, _ in series(outcome.rows, "repr/view_error_ratio") if at > 0]


def _growth(key: str) -> Callable[[Outcome], Score]:
    return lambda outcome: [(at, low) for at, _, low in ratio_growth(outcome.rows, key)]


EPOCHS = Rule("epochs", epochs)
STEPS = Rule("optimizer steps", level("train/optimizer_steps"))
THE_VERDICT = Rule(VERDICT, _verdict, threshold=0.5)
RULES: Sequence[Rule] = (
    THE_VERDICT,
    Rule("the first verdict's rule, on the new ratio", _first_verdict, threshold=0.5),
    EPOCHS,
    STEPS,
    Rule("view error ratio, level", level("repr/view_error_ratio")),
    Rule("view error ratio, rate of growth", _growth("repr/view_error_ratio")),
    Rule("view AUC", level("repr/view_auc")),
    Rule("view excess", level("repr/view_excess")),
    Rule("view error ratio at half the noise", level("repr/view_error_ratio_x0.5")),
    Rule("view error ratio at four times the noise", level("repr/view_error_ratio_x4")),
    Rule("far error ratio, level", level("repr/far_error_ratio")),
    Rule("far error ratio, rate of growth", _growth("repr/far_error_ratio")),
    Rule("ICR past its minimum (argmin)", over_lowest("repr/icr", relative=False)),
    Rule("ICR, certain rise (lower bound, paired)", level("repr/icr_rise_low")),
    Rule("Fisher residual energy", level("repr/fisher_residual_energy"), either_way=True),
    Rule("stable rank of the bottleneck", level("repr/stable_rank"), either_way=True),
    Rule("feature deviation", level("repr/feature_deviation"), either_way=True),
    Rule("SimA", level("repr/sima"), either_way=True),
    Rule("Alignment", level("repr/alignment"), either_way=True),
    Rule("RankMe", level("repr/rankme"), either_way=True),
    Rule("train/held-out loss gap", log_gap, heldout=True),
    Rule("train/held-out error ratio", level("repr/heldout_error_ratio"), heldout=True),
    Rule("held-out loss past its minimum", over_lowest("loss/heldout", relative=True), heldout=True),
)

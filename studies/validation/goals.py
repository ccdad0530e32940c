"""The goals of the study and their outcomes: the first lines of `docs/validation.md`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from studies.validation import tables
from studies.validation.outcomes import LEADING, TWO, Outcome
from studies.validation.rivals import EPOCHS, THE_VERDICT
from studies.validation.rules import Rates, Rule, alarms_of, concordance, rates
from studies.validation.runs import Plan

CAUGHT, FALSE, SHARE, MEMORIZING, CONCORDANCE = 0.95, 0.05, 0.55, 0.9, 0.85
FORECAST = (0.7, 0.9)  # of the onsets that an 80 % interval holds
COLOURED = ("cifar",)  # sets of images with three channels
RATIOS = ("far error ratio, level", "far error ratio, rate of growth")  # the rules whose concordance is a goal
FEWEST_RUNS = 40  # with fewer, the page says that nothing stands yet


@dataclass(frozen=True)
class Goal:
    """A goal of the study, its outcome, and whether it was met; None without an outcome."""

    text: str
    outcome: str
    met: bool | None


def _share(text: str, count: int, total: int, *, least: float = 0.0, most: float = 1.0) -> Goal:
    return Goal(text, tables.share(count, total), least <= count / total <= most if total else None)


def _early(text: str, shares: Sequence[float]) -> Goal:
    return Goal(text, tables.quartiles(shares, "{:.2f}"), statistics.median(shares) <= SHARE if shares else None)


def goals(judged: Sequence[Outcome], rules: Sequence[Rule], plan: Plan) -> list[Goal]:
    """The goals, each on the runs that nothing was chosen on."""
    alarms = alarms_of(THE_VERDICT, judged)

    def of_verdict(runs: Sequence[Outcome], detector: str = LEADING) -> Rates:
        return rates(runs, alarms, detector, plan.open_factor)

    leading, two = of_verdict(judged), of_verdict(judged, TWO)
    grey = of_verdict([o for o in judged if o.images not in COLOURED])
    colour = of_verdict([o for o in judged if o.images in COLOURED])
    right, called = tables.memorizing_share(judged)
    first = tables.forecast_coverage(judged, last=False)
    caught = f"at least {CAUGHT:.0%} of the copying runs are caught ahead"
    clean = leading.clean - leading.open
    early = f"alarm / onset is at most {SHARE:g}"
    memorizing = f"`memorizing` is right by two detectors in at least {MEMORIZING:.0%}"
    held = f"the first forecast's 80 % interval holds {FORECAST[0]:.0%} to {FORECAST[1]:.0%} of the onsets"
    results = [
        _share(caught, leading.caught, leading.copying, least=CAUGHT),
        _share(f"{caught}, with onsets by a second detector", two.caught, two.copying, least=CAUGHT),
        _share(f"at most {FALSE:.0%} of the clean runs are accused", leading.false_alarms, clean, most=FALSE),
        _early(f"{early}, on grey images", grey.shares),
        _early(f"{early}, on colour images", colour.shares),
        _share(memorizing, right, called, least=MEMORIZING),
        _share(held, first.held, len(first.ratios), least=FORECAST[0], most=FORECAST[1]),
    ]
    for rule in (rule for rule in rules if rule.name in RATIOS):
        ranks = concordance(rule.score, judged, LEADING, plan.horizons_epochs)
        outcome = f"{ranks.value:.2f} ({ranks.low:.2f} to {ranks.high:.2f})" if ranks.pairs else "-"
        text = f"concordance at equal epochs is at least {CONCORDANCE:g}: {rule.name}"
        results.append(Goal(text, outcome, ranks.value >= CONCORDANCE if ranks.pairs else None))
    return results


def headline(outcomes: Sequence[Outcome], judged: Sequence[Outcome], rules: Sequence[Rule], plan: Plan) -> str:
    """The rates of the verdict and of counting epochs in a sentence, then each goal in a table."""
    if not outcomes:
        return f"**Nothing stands yet: none of the {len(plan.runs)} runs of the plan is trained.**"
    done = f"{len(outcomes)} of {len(plan.runs)} runs"
    part = "" if len(outcomes) == len(plan.runs) else f"Partial, {done}. "
    if len(outcomes) < FEWEST_RUNS:
        part = f"Nothing stands yet: {done} are trained. "
    clock = next(rule for rule in rules if rule.name == EPOCHS.name)
    verdict, epochs = (rates(judged, alarms_of(rule, judged), LEADING, plan.open_factor) for rule in (THE_VERDICT, clock))
    caught = "No run has copied yet"
    if verdict.copying:
        caught = f"The verdict caught {verdict.caught} of {verdict.copying} copying runs before their copies, counting epochs "
        caught += f"{epochs.caught} of {epochs.copying}"
    accused = f"it accused {verdict.false_alarms} of {verdict.clean - verdict.open} clean runs, counting epochs "
    accused += f"{epochs.false_alarms} of {epochs.clean - epochs.open}"
    met = {True: "yes", False: "**no**", None: "-"}
    rows = [[goal.text, goal.outcome, met[goal.met]] for goal in goals(judged, rules, plan)]
    brackets = (
        "Nothing was chosen on the runs in this table. Brackets are exact 95 % intervals of shares, quartiles of alarm /\n"
        "onset, and intervals of concordances by drawing the runs again. They are wide: "
        f"{verdict.copying} of these {len(judged)} runs copied."
    )
    table = tables.table(["goal", "what came out", "met"], rows)
    return "\n\n".join((f"**{part}{caught}; {accused}.**", brackets, table, *_missed(judged)))


def _missed(judged: Sequence[Outcome]) -> list[str]:
    """A sentence on the runs that the verdict did not catch ahead, with alarm and onset in epochs."""
    alarms, missed = alarms_of(THE_VERDICT, judged), []
    for o in judged:
        at, onset = alarms[o.name], o.onsets.get(TWO)
        if onset is not None and (at is None or at >= onset):
            alarm = "never" if at is None else f"at {at / o.num_images:.0f}"
            missed.append(f"`{o.name}` (alarm {alarm}, copies from {onset / o.num_images:.0f} epochs on)")
    return [f"Not caught ahead, with onsets by a second detector: {', '.join(missed)}."] if missed else []

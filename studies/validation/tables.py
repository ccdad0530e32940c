"""The tables of the validation page, each from outcomes alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from mlflow_icr.monitoring.forecast import Level
from mlflow_icr.monitoring.series import series
from studies.validation.coverage import Coverage
from studies.validation.outcomes import LEADING, TWO, Outcome, agreement
from studies.validation.rivals import RULES, THE_VERDICT, verdict_states, verdicts
from studies.validation.rules import Rates, Rule, alarms_of, concordance, rates, with_threshold
from studies.validation.runs import Plan


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def quartiles(values: Sequence[float], form: str) -> str:
    """Median and quartiles in words."""
    if len(values) < 2:
        return "-" if not values else form.format(values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{form.format(middle)} ({form.format(low)} to {form.format(high)})"


def share(count: int, total: int) -> str:
    """A count of a total, with its exact 95 % interval (Clopper & Pearson 1934)."""
    if not total:
        return "-"
    interval = binomtest(count, total).proportion_ci(method="exact")
    return f"{count} of {total} ({interval.low:.0%} to {interval.high:.0%})"


def rates_cells(rule_rates: Rates) -> list[str]:
    """Caught ahead, false alarms, those that are open, alarm over onset."""
    return [
        share(rule_rates.caught, rule_rates.copying),
        share(rule_rates.false_alarms, rule_rates.clean - rule_rates.open),
        str(rule_rates.open),
        quartiles(rule_rates.shares, "{:.2f}"),
    ]


RATES_HEAD = ["caught ahead", "false alarms", "open", "alarm / onset"]


def chosen_rules(chosen: Sequence[Outcome], plan: Plan) -> list[Rule]:
    """All rules, with thresholds and signs that were chosen on some runs."""
    return [with_threshold(rule, chosen, LEADING, plan.open_factor) for rule in RULES]


def has_score(rule: Rule, outcomes: Sequence[Outcome]) -> bool:
    """Whether any run has the values that the rule reads."""
    return any(rule.score(o) for o in outcomes)


def rules_table(rules: Sequence[Rule], judged: Sequence[Outcome], plan: Plan, detector: str = LEADING) -> str:
    """Every rule's rates on some runs, and its concordance at equal epochs."""
    rows = []
    for rule in rules:
        if not has_score(rule, judged):
            rows.append([rule.name, "yes" if rule.heldout else "", "not measured", *["-"] * 5])
            continue
        rule_rates = rates(judged, alarms_of(rule, judged), detector, plan.open_factor)
        ranks = concordance(rule.score, judged, detector, plan.horizons_epochs)
        c = f"{ranks.value:.2f} ({ranks.low:.2f} to {ranks.high:.2f})" if ranks.pairs else "-"
        threshold = "its own" if rule.threshold == 0.5 and rule in RULES else f"{rule.threshold:.3g}"
        rows.append([rule.name, "yes" if rule.heldout else "", threshold, *rates_cells(rule_rates), c])
    return table(["rule", "needs held-out data", "threshold", *RATES_HEAD, "concordance at equal epochs"], rows)


def left_out_table(outcomes: Sequence[Outcome], plan: Plan) -> str:
    """Every rule's rates on each set of images, with its threshold chosen on the other sets, added up over the sets."""
    sets = sorted({o.images for o in outcomes})
    rows = []
    for rule in RULES:
        if not has_score(rule, outcomes):
            continue
        alarms: dict[str, int | None] = {}
        for left_out in sets:
            others = [o for o in outcomes if o.images != left_out]
            chosen = with_threshold(rule, others, LEADING, plan.open_factor)
            alarms |= alarms_of(chosen, [o for o in outcomes if o.images == left_out])
        rows.append([rule.name, *rates_cells(rates(outcomes, alarms, LEADING, plan.open_factor))])
    return table(["rule", *RATES_HEAD], rows)


def by_group_table(outcomes: Sequence[Outcome], plan: Plan) -> str:
    """The verdict's rates by images, family, kind and augmentation, on all runs: it was fitted on none of them."""
    alarms = alarms_of(THE_VERDICT, outcomes)
    rows = []
    for factor in ("images", "family", "augment", "kind"):
        for value in sorted({str(o.factors.get(factor, "decoupled")) for o in outcomes}):
            group = [o for o in outcomes if str(o.factors.get(factor, "decoupled")) == value]
            rows.append([f"{factor}: {value}", str(len(group)), *rates_cells(rates(group, alarms, LEADING, plan.open_factor))])
    return table(["runs", "of them", *RATES_HEAD], rows)


def detectors_table(outcomes: Sequence[Outcome], plan: Plan) -> str:
    """How far the detectors agree, pair by pair, and which of two is earlier."""
    names = [name for name in plan.truth if any(name in o.onsets for o in outcomes)]
    rows = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both, one, other, neither = agreement(outcomes, first, second)
            times = [(o.onsets.get(first), o.onsets.get(second)) for o in outcomes]
            ratios = [a / b for a, b in times if a and b]  # none where copies are there at the first measurement, at 0
            rows.append([first, second, str(both), str(one), str(other), str(neither), quartiles(ratios, "{:.2f}")])
    head = ["one", "another", "both find copies", "the one alone", "the other alone", "neither", "onset of one / other"]
    return table(head, rows)


def memorizing_share(outcomes: Sequence[Outcome]) -> tuple[int, int]:
    """In how many runs two detectors or more found copies by the end, among those ever called memorizing; and their number."""
    called = [o for o in outcomes if any(state == "memorizing" for _, state in verdict_states(o.rows))]
    return sum(o.onsets[TWO] is not None for o in called), len(called)


@dataclass(frozen=True)
class ForecastCoverage:
    """Copying runs: how many had a forecast before the onset, in how many its interval held that, and centre over onset."""

    runs: int
    had_one: int
    held: int
    ratios: tuple[float, ...]


def forecast_coverage(outcomes: Sequence[Outcome], *, last: bool) -> ForecastCoverage:
    """The coverage of the verdict's forecasts, by the leading detector: of the first one, or of the last before the onset."""
    runs, held, ratios = 0, 0, list[float]()
    for o in outcomes:
        onset = o.onsets.get(LEADING)
        if onset is None:
            continue
        runs += 1
        forecasts = [verdict.forecast for at, verdict in verdicts(o.rows) if at < onset]
        bounds = [(f.images_seen, f.low, f.high) for f in forecasts if f.images_seen is not None]
        if bounds:
            near, low, high = bounds[-1 if last else 0]
            assert low is not None
            assert high is not None
            held += low <= onset <= high
            ratios.append(near / onset)
    return ForecastCoverage(runs, len(ratios), held, tuple(ratios))


def forecast_table(outcomes: Sequence[Outcome]) -> str:
    """How often the forecasts' intervals hold the onset."""
    rows = []
    for name, last in (("the first", False), ("the last before the onset", True)):
        coverage = forecast_coverage(outcomes, last=last)
        had_one, held = share(coverage.had_one, coverage.runs), share(coverage.held, coverage.had_one)
        rows.append([name, had_one, held, quartiles(coverage.ratios, "{:.2f}")])
    return table(["forecast", "copying runs that had one", "its 80 % interval held the onset", "centre / onset"], rows)


def levels_table(levels: Sequence[Level]) -> str:
    """The package's table, where it has lines."""
    rows = [[f"{x.level:g}", f"{x.factor:.2f}", f"{x.low:.2f} to {x.high:.2f}", str(x.runs)] for x in levels]
    head = ["the ratio passes its lowest times", "onset / passing", "80 % interval", "runs"]
    return (
        table(head, rows) if rows else "It has no line yet: fewer than nine runs copied after the ratio had passed any level."
    )


def runs_table(outcomes: Sequence[Outcome]) -> str:
    """One row for each run."""
    alarms = alarms_of(THE_VERDICT, outcomes)
    rows = []

    def epoch(o: Outcome, at: int | None) -> str:
        return "-" if at is None else f"{at / o.num_images:.0f}"

    for o in outcomes:
        heldout = series(o.rows, "loss/heldout")
        lowest = min(heldout, key=lambda point: point[1])[0] if heldout else None
        ratio = dict(series(o.rows, "repr/view_error_ratio"))
        onsets = [epoch(o, o.onsets.get(name)) for name in (LEADING, "C_T", "authenticity", TWO)]
        last = ratio.get(o.end)
        rows.append(
            [
                o.name, "yes" if o.chosen_on else "", epoch(o, o.end), verdict_states(o.rows)[-1][1], epoch(o, alarms[o.name]),
                *onsets, epoch(o, lowest), "-" if last is None else f"{last:.2f}",
                f"{max((v for _, v in series(o.rows, 'mem/ratio_l2')), default=0):.2f}",
            ]
        )  # fmt: skip
    head = [
        "run", "chosen on", "epochs", "verdict at the end", "first alarm", "copies by distance ratio", "by C_T",
        "by authenticity", "by two", "lowest held-out loss", "view error ratio at the end", "most copies",
    ]  # fmt: skip
    return table(head, rows)


def coverage_table(coverages: Sequence[Coverage]) -> str:
    """Bias and coverage of the interval, one row for each family and size."""
    rows = [
        [
            c.family, str(c.n), str(c.k), str(c.d), f"{c.degrees_per_dimension:.1f}", f"{c.truth:.3f}", f"{c.plugin:.3f}",
            f"{c.debiased:.3f}", f"{c.centre:.3f}", f"{c.deviation:.4f}", f"{c.standard_error:.4f}", f"{c.coverage:.1%}",
        ]
        for c in coverages
    ]  # fmt: skip
    head = [
        "features", "N", "K", "D", "nu / D", "true ICR", "plug-in", "closed form", "centre", "its deviation", "SE",
        "coverage",
    ]  # fmt: skip
    return table(head, rows) if rows else "No simulation yet."


def counts(outcomes: Sequence[Outcome]) -> Mapping[str, int]:
    """How many runs copy by the leading detector, by two, by none."""
    return {
        "copying": sum(o.onsets.get(LEADING) is not None for o in outcomes),
        "two": sum(o.onsets[TWO] is not None for o in outcomes),
        "clean": sum(o.clean for o in outcomes),
    }

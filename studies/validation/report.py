"""`docs/validation.md`: what came out of the study, from its own result files."""

from __future__ import annotations

<<<<<<< HEAD
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_icr.monitoring.plots import COLOURS
from mlflow_icr.monitoring.series import series
from studies.validation import tables
from studies.validation.coverage import read_coverages
from studies.validation.outcomes import LEADING, TWO, Outcome, outcome_of, write_outcomes
from studies.validation.results import Result
from studies.validation.rivals import EPOCHS, THE_VERDICT
from studies.validation.rules import Rule, alarms_of, concordance, rates
from studies.validation.runs import Plan
=======
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from mlflow_icr import summarise
from mlflow_icr.monitoring.evidence import Thresholds
from mlflow_icr.monitoring.plots import COLOURS
from mlflow_icr.monitoring.series import read_history, series
from mlflow_icr.monitoring.verdict import verdict
from studies.validation.coverage import Coverage, read_coverages
from studies.validation.rules import (
    MOST_FALSE_ALARMS,
    RULES,
    Outcome,
    Rates,
    alarm,
    choose_threshold,
    elasticities,
    rates,
    verdict_alarm,
)
from studies.validation.runs import ValidationRun
>>>>>>> 7509745 (Verdict anew: what it says now and when it turned are two things, clocks start at an origin, missing evidence acquits nobody, and memorizing takes two detectors of copies; one more row costs the same however long the history)
from studies.validation.window import HEAD as HEAD_OF_WINDOW
from studies.validation.window import RESULTS, read_sweeps, window_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = (
    ("repr/view_error_ratio", "view error ratio", True),
    ("repr/icr_debiased", "ICR, debiased", False),
    ("mem/ratio_l2", "share of copies", False),
)
# What the study was to show, on the runs that nothing was chosen on.
TARGETS = {"caught": 0.95, "false": 0.05, "share": 0.55, "memorizing": 0.9, "concordance": 0.85}


<<<<<<< HEAD
def headline(outcomes: Sequence[Outcome], judged: Sequence[Outcome], rules: Sequence[Rule], plan: Plan) -> str:
    """What came out, in a few sentences: on the runs that nothing was chosen on, beside what was to be shown."""
    found = rates(judged, alarms_of(THE_VERDICT, judged), LEADING, plan.open_factor)
    clock = next(rule for rule in rules if rule.name == EPOCHS.name)
    epochs = rates(judged, alarms_of(clock, judged), LEADING, plan.open_factor)
    right, called = tables.memorizing_share(judged)
    best = max(
        (
            (concordance(r.score, judged, LEADING, plan.horizons_epochs, draws=0).value, r.name)
            for r in rules
            if r.threshold != 0.5
        ),
        key=lambda entry: (entry[0] == entry[0], entry[0]),
    )
    told = []
    part = "" if len(outcomes) == len(plan.runs) else f"Partial, {len(outcomes)} of {len(plan.runs)} runs: "
    told.append(
        f"**{part}of the copying runs that nothing was chosen on, the verdict caught "
        f"{tables.share(found.caught, found.copying)} ahead, and counting epochs "
        f"{tables.share(epochs.caught, epochs.copying)}; of the clean ones the verdict accused "
        f"{tables.share(found.false_alarms, found.clean - found.open)} and counting epochs "
        f"{tables.share(epochs.false_alarms, epochs.clean - epochs.open)}.**"
    )
    told.append(
        f"Alarm over onset: {tables.quartiles(found.shares, '{:.2f}')}. `memorizing` was right by two detectors in "
        f"{tables.share(right, called)}. Highest concordance at equal epochs: {best[0]:.2f}, of {best[1]}."
    )
    t = {key: f"{value:.0%}" for key, value in TARGETS.items()}
    targets = (
        f"It was to catch {t['caught']} ahead with at most {t['false']} false alarms, at {TARGETS['share']:g} of the onset or "
        f"before, to be right with `memorizing` in {t['memorizing']}, and to have a concordance of "
        f"{TARGETS['concordance']:g}. Brackets are exact 95 % intervals, by the numbers of runs alone."
    )
    return "\n".join([*told, targets])
=======
def read_outcomes(results: Path) -> dict[str, Outcome]:
    """The runs whose results are there, by name."""
    found = {}
    for folder in sorted(results.glob("*/")):
        rows = read_history(folder)
        onset = summarise(rows).get("mem_onset_images_seen")
        found[folder.name] = Outcome(folder.name, rows, "-rich-" in folder.name, None if onset is None else int(onset))
    return found


def chosen_on(run: ValidationRun) -> bool:
    """Whether a run is of the half on which thresholds are chosen: even seeds of digits."""
    return run.preset == "digits" and run.seed % 2 == 0


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def _quartiles(values: Sequence[float], form: str) -> str:
    if len(values) < 2:
        return "-" if not values else form.format(values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{form.format(middle)} ({form.format(low)} to {form.format(high)})"


def _rates_row(name: str, threshold: str, found: Rates, heldout: bool) -> list[str]:
    return [
        name,
        "yes" if heldout else "",
        threshold,
        f"{found.caught} of {found.limited} ({found.caught_rate:.0%})" if found.limited else "-",
        f"{found.false_alarms} of {found.rich} ({found.false_alarm_rate:.0%})" if found.rich else "-",
        _quartiles([lead / 1000 for lead in found.leads], "{:.0f}"),
        _quartiles(found.shares, "{:.2f}"),
    ]


HEAD = ["rule", "needs held-out data", "threshold", "caught ahead", "false alarms", "lead, kimg", "alarm / onset"]


def rules_table(chosen: Sequence[Outcome], judged: Sequence[Outcome]) -> str:
    """Every rule, its threshold chosen on one set of runs and its rates on another."""
    alarms = {o.name: verdict_alarm(o.rows) for o in judged}
    rows = [_rates_row(VERDICT, "its defaults", rates(judged, alarms), False)]
    for rule in RULES:
        threshold = choose_threshold(rule.score, chosen)
        found = rates(judged, {o.name: alarm(rule.score(o.rows), threshold) for o in judged})
        rows.append(_rates_row(rule.name, f"{threshold:.3g}", found, rule.heldout))
    return _table(HEAD, rows)


def bounds_text(judged: Sequence[Outcome]) -> str:
    """What so few runs leave open about the verdict's rates: exact one-sided bounds (Clopper & Pearson 1934)."""
    from scipy.stats import beta

    found = rates(judged, {o.name: verdict_alarm(o.rows) for o in judged})
    parts = []
    if found.caught:
        least = beta.ppf(0.05, found.caught, found.limited - found.caught + 1)
        parts.append(f"the verdict catches at least {least:.0%} ahead")
    if found.rich > found.false_alarms:
        most = beta.ppf(0.95, found.false_alarms + 1, found.rich - found.false_alarms)
        parts.append(f"accuses at most {most:.0%} of rich runs")
    return f"With 95 % confidence each, by the numbers of runs alone, {' and '.join(parts)}." if parts else ""


def by_set_table(groups: Sequence[tuple[str, Sequence[Outcome]]]) -> str:
    """The verdict's rates for each group of runs."""
    rows = []
    for name, outcomes in groups:
        if outcomes:
            found = rates(outcomes, {o.name: verdict_alarm(o.rows) for o in outcomes})
            rows.append([name, *_rates_row("", "", found, False)[3:]])
    return _table(["runs", *HEAD[3:]], rows)


def runs_table(outcomes: Sequence[Outcome]) -> str:
    """One row for each run."""
    rows = []
    for o in outcomes:
        found, at = verdict(o.rows), verdict_alarm(o.rows)
        ratio = dict(series(o.rows, "repr/view_error_ratio"))
        heldout = series(o.rows, "loss/heldout")
        best = min(heldout, key=lambda point: point[1])[0] if heldout else None
        slopes = elasticities(o.rows)
        rows.append(
            [
                o.name,
                f"{o.rows[-1]['images_seen'] / 1000:.0f}",
                found.state,
                f"{found.turned_at / 1000:.1f}" if found.turned_at is not None else "-",
                f"{at / 1000:.1f}" if at is not None else "-",
                f"{o.onset / 1000:.1f}" if o.onset is not None else "-",
                f"{ratio[o.onset]:.1f}" if o.onset in ratio else "-",
                f"{best / 1000:.1f}" if best is not None else "-",
                f"{max((s.low for s in slopes), default=float('nan')):.2f}",
                f"{max((row.get('repr/icr_rise', 0.0) for row in o.rows), default=0.0):.3f}",
                f"{max((row.get('mem/ratio_l2', 0.0) for row in o.rows), default=0.0):.2f}",
            ]
        )
    head = [
        "run", "kimg", "verdict", "turn, kimg", "first said, kimg", "copies from, kimg", "view error ratio there",
        "lowest held-out loss, kimg", "fastest growth", "largest ICR rise", "most copies",
    ]  # fmt: skip
    return _table(head, rows)


def window_table(results: Path) -> str:
    """Where the features of each model are cleanest, layer by layer."""
    if not results.exists():
        return "It is not trained yet: `make validate` goes on with it."
    return _table(HEAD_OF_WINDOW, window_rows(read_sweeps(results)))


def coverage_table(coverages: Sequence[Coverage]) -> str:
    """Bias and coverage, one row for each family and size."""
    rows = [
        [
            c.family, str(c.n), str(c.k), str(c.d), f"{c.degrees_per_dimension:.1f}", f"{c.truth:.3f}", f"{c.plugin:.3f}",
            f"{c.debiased:.3f}", f"{c.centre:.3f}", f"{c.deviation:.4f}", f"{c.standard_error:.4f}", f"{c.coverage:.1%}",
        ]
        for c in coverages
    ]  # fmt: skip
    head = [
        "features",
        "N",
        "K",
        "D",
        "nu / D",
        "true ICR",
        "plug-in",
        "closed form",
        "centre",
        "its deviation",
        "SE",
        "coverage",
    ]
    return _table(head, rows)
>>>>>>> 7509745 (Verdict anew: what it says now and when it turned are two things, clocks start at an origin, missing evidence acquits nobody, and memorizing takes two detectors of copies; one more row costs the same however long the history)


def _draw(axes: Axes, outcomes: Sequence[Outcome], key: str, label: str, *, log: bool) -> None:
    for o in outcomes:
        points = {at: value for at, value in series(o.rows, key) if at > 0}
        onset = o.onsets.get(LEADING)
        if points:
            colour = COLOURS[0] if onset is not None else COLOURS[1] if o.clean else "0.6"
            axes.plot([at / o.num_images for at in points], list(points.values()), color=colour, linewidth=0.8, alpha=0.7)
        if onset in points:
            axes.plot(onset / o.num_images, points[onset], "k.", markersize=5)
    axes.set_xscale("log")
    if log:
        axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.grid(alpha=0.2)


def write_figure(outcomes: Sequence[Outcome], path: Path) -> None:
    """All curves of all runs over epochs: copying ones red, clean ones blue, disputed ones grey, a dot where copies begin."""
    from matplotlib.figure import Figure

    sets = sorted({str(o.factors["images"]) for o in outcomes})
    figure = Figure(figsize=(3.6 * len(sets), 8), layout="constrained")
    panels = figure.subplots(len(CURVES), len(sets), squeeze=False, sharex="col")
    for column, name in enumerate(sets):
        for row, (key, label, log) in enumerate(CURVES):
            _draw(panels[row, column], [o for o in outcomes if o.factors["images"] == name], key, label, log=log)
        panels[0, column].set_title(name)
        panels[-1, column].set_xlabel("epochs")
    figure.savefig(path, dpi=100, metadata={"Software": None})


def window_table(results: Path) -> str:
    """Where the features of each model are cleanest, layer by layer."""
    if not results.exists():
        return "It is not trained yet: `make validate` goes on with it."
    return tables.table(HEAD_OF_WINDOW, window_rows(read_sweeps(results)))


def truth_text(plan: Plan) -> str:
    """The detectors' definitions, a line each."""
    lines = []
    for name, rule in plan.truth.items():
        bound = f"above {rule['above']:g}" if "above" in rule else f"below {rule['below']:g}"
        lines.append(f"- *{name}*: `{rule['key']}` is {bound} from there to the end")
    return "\n".join(lines)


def write_report(results: Sequence[Result], plan: Plan, docs: Path) -> None:
    """Fill `docs/validation.template.md` with what the results say, as `docs/validation.md`; and the table of outcomes."""
    there = {result.name: outcome_of(result, plan) for result in results}
    outcomes = [there[run.name] for run in plan.runs if run.name in there]
    chosen, judged = [o for o in outcomes if o.chosen_on], [o for o in outcomes if not o.chosen_on]
    rules = tables.chosen_rules(chosen, plan)
    write_figure(outcomes, docs / "images" / "validation.png")
    measured = [rule for rule in rules if tables.has_score(rule, outcomes)]
    write_outcomes(docs / "validation" / "outcomes.csv", outcomes, {rule.name: alarms_of(rule, outcomes) for rule in measured})
    count = tables.counts(outcomes)
    values = {
<<<<<<< HEAD
        "headline": headline(outcomes, judged, rules, plan),
        "runs_done": f"{len(outcomes)} of {len(plan.runs)}",
        "counts": f"{count['copying']} copy by the leading detector, {count['two']} by two or more, {count['clean']} by none",
        "judged": str(len(judged)),
        "truth": truth_text(plan),
        "open_factor": f"{plan.open_factor:g}",
        "horizons": ", ".join(f"{h:g}" for h in plan.horizons_epochs),
        "rules": tables.rules_table(rules, judged, plan),
        "rules_two": tables.rules_table(rules, judged, plan, TWO),
        "rules_chosen": tables.rules_table(rules, chosen, plan),
        "left_out": tables.left_out_table(outcomes, plan),
        "by_group": tables.by_group_table(outcomes, plan),
        "detectors": tables.detectors_table(outcomes, plan),
        "runs": tables.runs_table(outcomes),
=======
        "runs_done": f"{len(there)} of {len(runs)}",
        "missing": f"{len(missing)} are not trained yet: `make validate` goes on with them." if missing else "",
        "most_false_alarms": f"{MOST_FALSE_ALARMS:.0%}",
        "thresholds": yaml.safe_dump({key: getattr(t, key) for key in t.__dataclass_fields__}, sort_keys=False).strip(),
        "chosen_elasticity": f"{choose_threshold(RULES[0].score, chosen):.2f}" if chosen else "-",
        "ratio_at_onset": _quartiles(at_onset, "{:.1f}"),
        "bounds": bounds_text(judged),
        "rules": rules_table(chosen, judged),
        "rules_chosen": rules_table(chosen, chosen),
        "by_set": by_set_table([*groups, ("all that were not chosen on", judged)]),
        "runs": runs_table([outcomes[run.name] for run in there]),
>>>>>>> 7509745 (Verdict anew: what it says now and when it turned are two things, clocks start at an origin, missing evidence acquits nobody, and memorizing takes two detectors of copies; one more row costs the same however long the history)
        "window": window_table(docs / "validation" / RESULTS),
        "coverage": tables.coverage_table(read_coverages(docs / "validation" / "coverage.csv")),
    }
    text = (docs / "validation.template.md").read_text()
    for key, value in values.items():
        text = text.replace("{{" + key + "}}", value)
    (docs / "validation.md").write_text(text)

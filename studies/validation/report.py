"""`docs/validation.md`: the tables and figures of the validation study, from its own result files."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from mlflow_icr import summarise
from mlflow_icr.monitoring.plots import COLOURS
from mlflow_icr.monitoring.series import read_history, series
from mlflow_icr.monitoring.verdict import Thresholds, elasticities, verdict
from studies.validation.coverage import Coverage, read_coverages
from studies.validation.rules import (
    MOST_FALSE_ALARMS,
    RULES,
    Outcome,
    Rates,
    alarm,
    choose_threshold,
    rates,
    verdict_alarm,
)
from studies.validation.runs import ValidationRun
from studies.validation.window import HEAD as HEAD_OF_WINDOW
from studies.validation.window import RESULTS, read_sweeps, window_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VERDICT = "**the verdict**"


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


# Chosen when half of the runs for choosing were there; the page says what became of it.
EARLIER_RISE = 0.04
HEAD = ["rule", "needs held-out data", "threshold", "caught ahead", "false alarms", "lead, kimg", "alarm / onset"]


def rules_table(chosen: Sequence[Outcome], judged: Sequence[Outcome]) -> str:
    """Every rule, its threshold chosen on one set of runs and its rates on another."""
    alarms = {o.name: verdict_alarm(o.rows) for o in judged}
    rows = [_rates_row(VERDICT, "its defaults", rates(judged, alarms), False)]
    before = {o.name: verdict_alarm(o.rows, replace(Thresholds(), rise=EARLIER_RISE)) for o in judged}
    rows.append(_rates_row("the verdict as it was first", f"rise {EARLIER_RISE:g}", rates(judged, before), False))
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
                f"{found.turning_images_seen / 1000:.1f}" if found.turning_images_seen is not None else "-",
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


def _draw(axes: Axes, outcomes: Sequence[Outcome], key: str, label: str, *, log: bool) -> None:
    for o in outcomes:
        points = [(at / 1000, value) for at, value in series(o.rows, key) if at > 0]
        if points:
            axes.plot(*zip(*points, strict=True), color=COLOURS[1] if o.rich else COLOURS[0], linewidth=0.8, alpha=0.7)
        if o.onset is not None and o.onset / 1000 in dict(points):
            axes.plot(o.onset / 1000, dict(points)[o.onset / 1000], "k.", markersize=5)
    axes.set_xscale("log")
    if log:
        axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.grid(alpha=0.2)


def write_figure(groups: Sequence[tuple[str, Sequence[Outcome]]], path: Path) -> None:
    """All curves of all runs: limited ones red, rich ones blue, a dot where copies begin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(groups), 9), layout="constrained")
    panels = figure.subplots(3, len(groups), squeeze=False, sharex="col")
    for column, (name, outcomes) in enumerate(groups):
        for row, (key, label, log) in enumerate(
            (
                ("repr/view_error_ratio", "view error ratio", True),
                ("repr/icr_debiased", "ICR, debiased", False),
                ("repr/fisher_residual_energy", "Fisher residual energy", True),
            )
        ):
            _draw(panels[row, column], outcomes, key, label, log=log)
        panels[0, column].set_title(name)
        panels[-1, column].set_xlabel("images seen (thousands)")
    figure.savefig(path, dpi=110)


def write_report(outcomes: dict[str, Outcome], runs: Sequence[ValidationRun], docs: Path) -> None:
    """Fill `docs/validation.template.md` with what the result files say, as `docs/validation.md`."""
    there = [run for run in runs if run.name in outcomes]
    chosen = [outcomes[run.name] for run in there if chosen_on(run)]
    judged = [outcomes[run.name] for run in there if not chosen_on(run)]
    groups = [
        ("digits, chosen on", chosen),
        ("digits, not chosen on", [outcomes[r.name] for r in there if r.preset == "digits" and not chosen_on(r)]),
        ("MNIST-5k, 12x12", [outcomes[r.name] for r in there if r.preset == "mnist5k"]),
        ("Fashion-MNIST, 12x12", [outcomes[r.name] for r in there if r.preset == "fashion-mnist"]),
    ]
    groups = [(name, found) for name, found in groups if found]
    write_figure(groups, docs / "images" / "validation.png")
    t = Thresholds()
    missing = [run.name for run in runs if run.name not in outcomes]
    at_onset = [dict(series(o.rows, "repr/view_error_ratio"))[o.onset] for o in chosen if o.onset is not None]
    values = {
        "runs_done": f"{len(there)} of {len(runs)}",
        "missing": f"{len(missing)} are not trained yet: `make validate` goes on with them." if missing else "",
        "most_false_alarms": f"{MOST_FALSE_ALARMS:.0%}",
        "thresholds": yaml.safe_dump({key: getattr(t, key) for key in t.__dataclass_fields__}, sort_keys=False).strip(),
        "chosen_elasticity": f"{choose_threshold(RULES[0].score, chosen):.2f}" if chosen else "-",
        "ratio_at_onset": _quartiles(at_onset, "{:.1f}"),
        "earlier_rise": f"{EARLIER_RISE:g}",
        "bounds": bounds_text(judged),
        "rules": rules_table(chosen, judged),
        "rules_chosen": rules_table(chosen, chosen),
        "by_set": by_set_table([*groups, ("all that were not chosen on", judged)]),
        "runs": runs_table([outcomes[run.name] for run in there]),
        "window": window_table(docs / "validation" / RESULTS),
        "coverage": coverage_table(read_coverages(docs / "validation" / "coverage.csv")),
    }
    text = (docs / "validation.template.md").read_text()
    for key, value in values.items():
        text = text.replace("{{" + key + "}}", value)
    (docs / "validation.md").write_text(text)

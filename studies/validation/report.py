"""`docs/validation.md`: the results of the study, from its own result files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_icr.monitoring.forecast import calibration
from mlflow_icr.monitoring.plots import COLOURS
from mlflow_icr.monitoring.series import series
from studies.validation import tables
from studies.validation.coverage import read_coverages
from studies.validation.earlier import counts_text, earlier_table, read_earlier
from studies.validation.goals import headline
from studies.validation.outcomes import LEADING, TWO, Outcome, outcome_of, write_outcomes
from studies.validation.results import Result
from studies.validation.rules import alarms_of
from studies.validation.runs import Plan
from studies.validation.window import HEAD as HEAD_OF_WINDOW
from studies.validation.window import RESULTS, read_sweeps, window_rows
from studies.views.results import read_lines, table_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = (
    ("repr/view_error_ratio", "view error ratio", True),
    ("repr/icr_debiased", "ICR, debiased", False),
    ("mem/ratio_l2", "share of copies", False),
)


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

    sets = sorted({str(o.factors["images"]) for o in outcomes}) or ["no run yet"]
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
        return "It is not trained yet: `make validate` continues."
    return tables.table(HEAD_OF_WINDOW, window_rows(read_sweeps(results)))


def truth_text(plan: Plan) -> str:
    """The detectors' definitions, a line each."""
    lines = []
    for name, rule in plan.truth.items():
        bound = f"above {rule['above']:g}" if "above" in rule else f"below {rule['below']:g}"
        lines.append(f"- *{name}*: `{rule['key']}` is {bound} from there to the end")
    return "\n".join(lines)


def write_report(results: Sequence[Result], plan: Plan, docs: Path) -> None:
    """Fill `docs/validation.template.md` from the results, as `docs/validation.md`, and write the table of outcomes."""
    by_name = {result.name: outcome_of(result, plan) for result in results}
    outcomes = [by_name[run.name] for run in plan.runs if run.name in by_name]
    chosen, judged = [o for o in outcomes if o.chosen_on], [o for o in outcomes if not o.chosen_on]
    rules = tables.chosen_rules(chosen, plan)
    write_figure(outcomes, docs / "images" / "validation.png")
    measured = [rule for rule in rules if tables.has_score(rule, outcomes)]
    write_outcomes(docs / "validation" / "outcomes.csv", outcomes, {rule.name: alarms_of(rule, outcomes) for rule in measured})
    count = tables.counts(outcomes)
    values = {
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
        "forecast": tables.forecast_table(judged),
        "levels": tables.levels_table(calibration()[1]),
        "runs": tables.runs_table(outcomes),
        "window": window_table(docs / "validation" / RESULTS),
        "views": table_of(read_lines(docs / "validation" / "views.csv")),
        "coverage": tables.coverage_table(read_coverages(docs / "validation" / "coverage.csv")),
    }
    earlier = read_earlier(docs / "validation" / "runs", plan)
    values |= {"earlier_counts": counts_text(earlier), "earlier": earlier_table(earlier, plan)}
    text = (docs / "validation.template.md").read_text()
    for key, value in values.items():
        text = text.replace("{{" + key + "}}", value)
    (docs / "validation.md").write_text(text)

"""Compare several runs: their results, whether they may be compared, and their differences."""

from __future__ import annotations

from collections.abc import Sequence

from mlflow_icr.monitoring.verdict import GENERALIZING, MEMORIZING, TURNING, UNDECIDED
from mlflow_icr.reporting.charts import COLOURS, Curve, legend
from mlflow_icr.reporting.curves import comparison_charts
from mlflow_icr.reporting.markup import Child, Markup, element, fold, images_text, interval, joined, number, table
from mlflow_icr.reporting.material import RunMaterial

# If there are more lines than colours, each has the colour of its run's verdict.
BY_STATE = {MEMORIZING: 0, GENERALIZING: 1, TURNING: 4}
UNKNOWN_COLOUR = 7
FOLDED_FROM = 12  # longer tables of parameters are folded


def colours_of(runs: Sequence[RunMaterial]) -> list[int]:
    """A colour for each run: its own where there are enough, else that of its verdict."""
    if len(runs) <= COLOURS:
        return list(range(len(runs)))
    return [BY_STATE.get(run.verdict.state, UNKNOWN_COLOUR) for run in runs]


def badge(state: str) -> Markup:
    """A verdict as a coloured word."""
    return element("span", state, class_=f"badge {state if state.isalpha() else 'undecided'}")


def value_cell(run: RunMaterial, key: str, point: tuple[int, float] | None, *, at: bool = True) -> Markup:
    """A value with its interval and where it was measured; a dash for none."""
    if point is None:
        return joined("\N{EN DASH}")
    step, value = point
    bounds = run.bounds(key, step)
    parts: list[Child] = [number(value, key=key, step=step)]
    parts.append([" ", interval(*bounds, key, step)] if bounds else None)
    parts.append(element("span", f" at {images_text(step)}", class_="quiet") if at else None)
    return joined(parts)


def turn_cell(run: RunMaterial) -> Markup:
    """When a run turned, with bounds; a dash if it did not."""
    verdict = run.verdict
    if verdict.turned_at is None or verdict.low is None or verdict.high is None:
        return joined("\N{EN DASH}")
    turned_at = number(verdict.turned_at, key="turned_at_images_seen")
    ends = ((verdict.low, "low"), (verdict.high, "high"))
    low, high = (number(at, key=f"turned_at_images_seen_{end}") for at, end in ends)
    bounds = joined(low, " to ", high)
    return joined(turned_at, " ", element("span", "(", bounds, ")", class_="interval"))


def onset_cell(run: RunMaterial) -> Markup:
    """The onset of copies; a dash for none."""
    onset = run.summary.get("mem_onset_images_seen")
    return joined("\N{EN DASH}") if onset is None else number(onset, key="mem_onset_images_seen")


def run_table(runs: Sequence[RunMaterial], links: Sequence[str]) -> Markup:
    """One row for each run with an ICR."""
    head = ("run", "verdict", "turned at (from, to)", "last ICR", "lowest ICR", "copies", "copies begin", "status", "protocol")
    rows = []
    for run, link in zip(runs, links, strict=True):
        key, digest = run.icr_key, run.protocol.get("digest", "")
        name = element("a", run.name, href=f"#{link}") if link else joined(run.name)
        rows.append(
            [
                name,
                badge(run.verdict.state),
                turn_cell(run),
                value_cell(run, key, run.last(key)),
                value_cell(run, key, run.lowest(key)),
                value_cell(run, "mem/ratio_l2", run.last("mem/ratio_l2"), at=False),
                onset_cell(run),
                run.status or "not known",
                element("code", digest) if digest else "not recorded",
            ]
        )
    return table(head, rows, class_="wide")


def protocol_warning(runs: Sequence[RunMaterial]) -> Markup | None:
    """A plain warning where protocols differ or are not known; None where all are the same."""
    groups: dict[str, list[RunMaterial]] = {}
    for run in runs:
        groups.setdefault(run.protocol.get("digest", ""), []).append(run)
    if len(groups) == 1 and "" not in groups:
        return None
    parts: list[Child] = []
    recorded = {digest: group for digest, group in groups.items() if digest}
    if len(recorded) > 1:
        text = (
            "These runs were not measured in the same way: their protocols differ, and their values of ICR are not comparable."
        )
        parts.append(element("p", element("strong", text)))
        parts.append(element("ul", [element("li", _names(group), ": ", element("code", d)) for d, group in recorded.items()]))
        fields = _differing_fields([group[0] for group in recorded.values()])
        if fields:
            parts.append(element("p", "They differ in ", ", ".join(fields), "."))
    if "" in groups:
        text = "No protocol was recorded for %s: whether their values may be compared is not known."
        parts.append(element("p", text % _names(groups[""])))
    return element("div", parts, class_="warning", role="note")


def _names(runs: Sequence[RunMaterial]) -> str:
    names = ", ".join(run.name for run in runs[:6])
    return f"{names} and {len(runs) - 6} more" if len(runs) > 6 else names


def _differing_fields(runs: Sequence[RunMaterial]) -> list[str]:
    fields = sorted({name for run in runs for name in run.protocol} - {"digest"})
    differences = []
    for name in fields:
        values = [run.protocol.get(name, "not recorded") for run in runs]
        if len(set(values)) > 1:
            differences.append(f"{name} ({' / '.join(values)})")
    return differences


def parameter_table(runs: Sequence[RunMaterial]) -> Markup:
    """Parameters that are not the same in all runs."""
    keys = sorted({key for run in runs for key in run.params})
    rows = []
    for key in keys:
        values = [run.params.get(key, "\N{EN DASH}") for run in runs]
        if len(set(values)) > 1:
            rows.append([element("code", key), *values])
    if not rows:
        return element("p", "The recorded parameters of these runs are the same.")
    parameters = table(("parameter", *(run.name for run in runs)), rows, class_="parameters")
    return parameters if len(rows) < FOLDED_FROM else fold(f"{len(rows)} parameters", parameters)


def comparison(runs: Sequence[RunMaterial], links: Sequence[str]) -> Markup:
    """The section that compares runs with an ICR; `links` are the names of their own sections, or empty."""
    colours = colours_of(runs)
    note = None
    if len(runs) > COLOURS:
        states = [Curve(state, (), colour=colour) for state, colour in {**BY_STATE, UNDECIDED: UNKNOWN_COLOUR}.items()]
        note = joined(
            element("p", "There are many curves: each has the colour of its run's verdict.", class_="quiet"), legend(states)
        )
    return joined(
        protocol_warning(runs),
        run_table(runs, links),
        note,
        element("div", comparison_charts(runs, colours), class_="charts"),
        element("h3", "Differences"),
        parameter_table(runs),
    )

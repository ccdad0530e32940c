"""A statement on each of the paper's claims, by fixed rules: agrees, disagrees or undecided, with the numbers.

A rule compares intervals where there are some, and rank correlations (Spearman) where a curve is to follow another. A claim is
judged on each run: it agrees where all show it, disagrees where none does, and is undecided between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from trainers.experiments.paper.plan import EDM_FEW, EDM_MANY, FLOW_FEW, FLOW_MANY

AGREES, DISAGREES, UNDECIDED, ABSENT = "agrees", "disagrees", "undecided", "not measured"
COPIES_BEGIN = 0.05  # share of samples, by the lower bound of its interval
FOLLOWS = 0.5  # Spearman's correlation from which a curve follows another
SATURATED = 0.9  # share of a curve's whole change
Results = Mapping[str, Mapping[str, Any]]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Claim:
    """A statement (`claim`) on a `figure` of the paper or beyond it, its outcome, and the rule and numbers behind it."""

    figure: int | str
    claim: str
    outcome: str
    numbers: str
    rule: str


def _of(results: Results, role: str, key: str = "trajectory") -> list[Any]:
    return [result[key] for result in results.values() if result["role"] == role and key in result]


def series(rows: Sequence[Mapping[str, Any]], *keys: str) -> list[np.ndarray]:
    """Columns of the rows after the start that have all keys."""
    complete = [row for row in rows if row["images_seen"] > 0 and all(row.get(key) is not None for key in keys)]
    return [np.array([row[key] for row in complete], dtype=float) for key in ("images_seen", *keys)]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation; NaN for fewer than 4 values, or if one side is constant."""
    if len(a) < 4 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def _judged(votes: Sequence[bool | None]) -> str:
    """Agrees if all seeds show it, disagrees if none does, else undecided."""
    if not votes:
        return ABSENT
    if all(vote is True for vote in votes):
        return AGREES
    return DISAGREES if all(vote is False for vote in votes) else UNDECIDED


Vote = tuple[bool | None, str]  # whether a run shows it, None where that cannot be told, and its numbers
Judge = Callable[[Any], Vote | None]  # of a run's rows; None where they are too few


def judged_claim(
    results: Results, figure: int | str, claim: str, rule: str, judges: Mapping[str, Judge], key: str = "trajectory"
) -> Claim:
    """The statement on all runs of the judges' roles, each judged by the judge of its role."""
    votes = [judge(rows) for role, judge in judges.items() for rows in _of(results, role, key)]
    cast = [vote for vote in votes if vote is not None]
    return Claim(figure, claim, _judged([vote for vote, _ in cast]), "; ".join(note for _, note in cast), rule)


def _window_vote(points: Rows) -> Vote | None:
    measured = [p for p in points if p["icr_debiased"] is not None and p["accuracy"] is not None]
    if len(measured) < 3:
        return None
    u = all(end["rise_low"] is not None and end["rise_low"] > 0 for end in (measured[0], measured[-1]))
    lowest = min(range(len(measured)), key=lambda i: measured[i]["icr_debiased"])
    best = max(range(len(measured)), key=lambda i: measured[i]["accuracy"])
    return u and abs(lowest - best) <= 1, (
        f"ICR lowest at sigma {measured[lowest]['sigma']:g}, probe best at {measured[best]['sigma']:g} "
        f"({measured[best]['accuracy']:.3f}), {'a U' if u else 'no U'}"
    )


def window_claim(results: Results) -> Claim:
    """Figure 2: over noise ICR is U-shaped in a model of many images, and lowest where a probe is best."""
    text = "ICR over noise is U-shaped; its minimum is where a linear probe is best"
    rule = "both ends above the lowest, paired 95 % interval, and the two optima at most one step of the grid apart"
    return judged_claim(results, 2, text, rule, {EDM_MANY: _window_vote, FLOW_MANY: _window_vote}, "window")


def _rich_vote(rows: Rows) -> Vote | None:
    _, icr, distance = series(rows, "icr_debiased", "frechet_pixels")
    if len(icr) < 4:
        return None
    spearman = correlation(icr, distance)
    return spearman > FOLLOWS and bool(icr[-1] < icr[0]), (
        f"ICR {icr[0]:.3f} to {icr[-1]:.3f}, Frechet {distance[0]:.3g} to {distance[-1]:.3g}, Spearman {spearman:.2f}"
    )


def rich_claim(results: Results) -> Claim:
    """Figure 3: with many images ICR and the Frechet distance fall together."""
    rule = f"ICR ends below its start, and Spearman's correlation with the distance is above {FOLLOWS}"
    return judged_claim(results, 3, "With many images ICR and the Frechet distance fall together", rule, {EDM_MANY: _rich_vote})


def _turn_vote(rows: Rows) -> Vote:
    """Whether ICR turns before copies begin; None where nothing was copied, or ICR has no interval."""
    seen, icr, rise_low, copies_low, copies = series(rows, "icr_debiased", "rise_low", "copies_low", "copies")
    if len(icr) < 4:
        return None, "too few measurements"
    lowest = int(icr.argmin())
    begun = np.flatnonzero(copies_low > COPIES_BEGIN)
    note = f"lowest {icr[lowest]:.3f} at {seen[lowest]:,.0f}, {icr[-1]:.3f} at the end, copies {copies[-1]:.2f}"
    if not len(begun):
        return None, note + ", no onset"
    note += f" from {seen[begun[0]]:,.0f}"
    return bool(rise_low[-1] > 0 and seen[lowest] < seen[begun[0]]), note


def turn_claim(results: Results, figure: int | str, role: str, what: str) -> Claim:
    """Figures 4 and 5: with few images ICR falls, turns before samples are copies, and rises."""
    rule = (
        "on every seed: ICR at the end above its lowest by the paired 95 % interval, and the lowest before the first "
        f"measurement with more than {100 * COPIES_BEGIN:g} % copies by the lower bound"
    )
    text = f"With few images ({what}) ICR falls, turns before samples are copies, and rises"
    return judged_claim(results, figure, text, rule, {role: _turn_vote})


def _neighbours_vote(rows: Rows) -> Vote | None:
    _, icr, agreement, error = series(rows, "icr_debiased", "neighbour_agreement", "neighbour_agreement_error")
    if len(icr) < 4:
        return None
    lowest = int(icr.argmin())
    gaps = [(agreement[lowest] - agreement[i], 1.96 * np.hypot(error[lowest], error[i])) for i in (0, -1)]
    vote = True if all(g > e for g, e in gaps) else False if any(g < -e for g, e in gaps) else None
    return vote, f"{agreement[0]:.3f} at first, {agreement[lowest]:.3f} at the lowest ICR, {agreement[-1]:.3f} at the end"


def neighbours_claim(results: Results) -> Claim:
    """Figure 6: neighbours by the invariant part agree most in class at the lowest ICR."""
    rule = "agreement of nine neighbours in class, at the lowest ICR above both ends by 1.96 standard errors of the difference"
    text = "Neighbours by the invariant part are most semantic at the lowest ICR"
    return judged_claim(results, 6, text, rule, {EDM_FEW: _neighbours_vote})


def _energies_vote(rows: Rows, limited: bool) -> Vote | None:
    _, invariant, residual = series(rows, "trace_invariant", "trace_residual")
    if len(invariant) < 4:
        return None
    half = len(invariant) // 2
    growth_s, growth_x = invariant[-1] / invariant[half], residual[-1] / residual[half]
    note = f"{'few' if limited else 'many'}: invariant x{growth_s:.2f}, residual x{growth_x:.2f}"
    return bool(growth_x > growth_s if limited else growth_s > growth_x), note


def energies_claim(results: Results) -> Claim:
    """Figure 7: with few images residual energy keeps growing and the invariant one saturates; with many it is the reverse."""
    rule = (
        "over the second half of measurements, the larger factor: with few images the residual trace's, with many the invariant"
    )
    text = "With few images residual energy keeps growing and invariant energy saturates; with many, invariant energy grows"
    judges = {EDM_FEW: partial(_energies_vote, limited=True), EDM_MANY: partial(_energies_vote, limited=False)}
    return judged_claim(results, 7, text, rule, judges)


def _noise_energies_vote(points: Rows) -> Vote | None:
    if any("trace_residual" not in p for p in points):
        return None
    sigma, residual, invariant = (np.array([p[key] for p in points]) for key in ("sigma", "trace_residual", "trace_invariant"))
    spearman, peak = correlation(sigma, residual), int(invariant.argmax())
    note = f"residual: Spearman {spearman:.2f} with sigma; invariant largest at sigma {sigma[peak]:g}"
    return spearman > 0.9 and 0 < peak < len(points) - 1, note


def noise_energies_claim(results: Results) -> Claim:
    """Figure 8: over noise the residual energy grows, and the invariant one peaks in the middle."""
    rule = "Spearman's correlation of the residual trace with sigma above 0.9, and the invariant trace largest inside the grid"
    text = "Residual energy grows with noise; invariant energy peaks in the middle"
    return judged_claim(results, 8, text, rule, {EDM_MANY: _noise_energies_vote}, "window")


def _lost_window_vote(points: Rows) -> Vote | None:
    measured = [p for p in points if p["icr_debiased"] is not None and p["accuracy"] is not None]
    if len(measured) < 4:
        return None
    sigma, icr, accuracy = (np.array([p[key] for p in measured]) for key in ("sigma", "icr_debiased", "accuracy"))
    up, down = correlation(sigma, icr), correlation(sigma, accuracy)
    return up > 0.9 and down < -0.9, f"Spearman with sigma: ICR {up:.2f}, accuracy {down:.2f}"


def lost_window_claim(results: Results) -> Claim:
    """Figure 9: after overfitting ICR rises with noise and the probe's accuracy falls: the window is gone."""
    rule = "Spearman's correlation with sigma above 0.9 for ICR, and below -0.9 for the probe's accuracy"
    text = "After overfitting ICR rises with noise and accuracy falls: the window is gone"
    return judged_claim(results, 9, text, rule, {EDM_FEW: _lost_window_vote}, "window")


def _alignment_vote(rows: Rows) -> Vote | None:
    _, alignment, distance = series(rows, "alignment", "frechet_pixels")
    if len(alignment) < 4:
        return None
    spearman = correlation(alignment, distance)
    note = f"Alignment {alignment[0]:.3f} to {alignment[-1]:.3f}, Spearman with the Frechet distance {spearman:.2f}"
    return spearman < -FOLLOWS, note


def alignment_claim(results: Results) -> Claim:
    """Figure 10: with many images Alignment rises while the Frechet distance falls."""
    rule = f"Spearman's correlation of Alignment and the Frechet distance below -{FOLLOWS}"
    text = "With many images Alignment rises while the Frechet distance falls"
    return judged_claim(results, 10, text, rule, {EDM_MANY: _alignment_vote})


def _class_vote(rows: Rows) -> Vote | None:
    _, icr, copies, silhouettes, separation = series(rows, "icr_debiased", "copies", "silhouette", "class_separation")
    if len(icr) < 6:
        return None
    lowest, half = int(icr.argmin()), len(icr) // 2
    early = [bool(abs(v[half] - v[0]) >= SATURATED * abs(v[-1] - v[0])) for v in (silhouettes, separation)]
    spearman = correlation(icr[lowest:], copies[lowest:])
    correlated = "too few measurements to tell" if np.isnan(spearman) else f"Spearman {spearman:.2f}"
    note = f"saturated by half: {early[0]}, {early[1]}; ICR with copies after its lowest: {correlated}"
    return None if all(early) and np.isnan(spearman) else all(early) and spearman > FOLLOWS, note


def class_claim(results: Results) -> Claim:
    """Figure 11: class measures saturate early, while ICR follows the copies."""
    rule = (
        f"both have {100 * SATURATED:g} % of their change by the middle measurement, and ICR follows copies after its lowest "
        f"(Spearman above {FOLLOWS})"
    )
    return judged_claim(results, 11, "Class measures saturate early; ICR follows the copies", rule, {EDM_FEW: _class_vote})


def _subset_vote(rows: Rows) -> Vote | None:
    all_images, smaller = rows[-1], [r for r in rows[:-1] if r.get("icr_debiased") is not None]
    if not smaller or all_images.get("icr_debiased") is None:
        return None
    first = smaller[0]
    num_holding = sum(r["icr_low"] <= all_images["icr_debiased"] <= r["icr_high"] for r in smaller)
    return bool(first["icr"] < all_images["icr_low"]), (
        f"{first['images']} images, width {first['dim']}: plug-in {first['icr']:.3f}, debiased {first['icr_debiased']:.3f}, "
        f"all {all_images['images']}: {all_images['icr_debiased']:.3f}; {num_holding} of {len(smaller)} intervals hold it"
    )


def subset_claim(results: Results) -> Claim:
    """Figure 12: on few images the plug-in ICR is badly low; the debiased one is not."""
    rule = "plug-in ICR of the smallest subset that has a debiased one, below the interval of all images"
    return judged_claim(results, 12, "On few images the plug-in ICR is badly low", rule, {EDM_MANY: _subset_vote}, "subsets")


def _trend_vote(rows: Rows, wanted: Callable[[str], bool]) -> Vote | None:
    """Whether every two of the wanted curves rise and fall together."""
    curves: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["images_seen"] > 0 and row.get("icr_debiased") is not None and wanted(row["what"]):
            curves.setdefault(row["what"], {})[row["images_seen"]] = row["icr_debiased"]
    names = sorted(curves)
    correlations = []
    for a, b in combinations(names, 2):
        steps = sorted(set(curves[a]) & set(curves[b]))
        correlations.append(correlation(*(np.array([curves[name][s] for s in steps]) for name in (a, b))))
    if not correlations:
        return None
    return min(correlations) > FOLLOWS, f"smallest Spearman of {', '.join(names)}: {min(correlations):.2f}"


def level_claim(results: Results) -> Claim:
    """Figure 13: from level 3 up the trend over training is the same."""
    rule = f"Spearman's correlation of every two curves of levels 3, 4 and 5 above {FOLLOWS}"
    judge = partial(_trend_vote, wanted=lambda what: what in ("level 3", "level 4", "level 5"))
    return judged_claim(results, 13, "From augmentation level 3 up the trends are the same", rule, {EDM_FEW: judge}, "levels")


def layer_claim(results: Results) -> Claim:
    """Figure 14: across middle layers the trend over training is the same."""
    rule = f"Spearman's correlation of every two layers' curves above {FOLLOWS}"
    judge = partial(_trend_vote, wanted=lambda what: True)
    return judged_claim(results, 14, "Across middle layers the trends are the same", rule, {EDM_FEW: judge}, "layers")


def all_claims(results: Results) -> list[Claim]:
    """The statements on figures 2 to 14, in their order."""
    return [
        window_claim(results),
        rich_claim(results),
        turn_claim(results, 4, EDM_FEW, "EDM"),
        turn_claim(results, 5, FLOW_FEW, "SiT"),
        neighbours_claim(results),
        energies_claim(results),
        noise_energies_claim(results),
        lost_window_claim(results),
        alignment_claim(results),
        class_claim(results),
        subset_claim(results),
        level_claim(results),
        layer_claim(results),
    ]

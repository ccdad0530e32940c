"""Further looks at statements that do not agree: a paragraph on each, with numbers from the same results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from trainers.experiments.paper.claims import Results, Rows, correlation, series
from trainers.experiments.paper.plan import EDM_FEW, EDM_MANY, FLOW_FEW, FLOW_MANY


def _named(results: Results, roles: Sequence[str], key: str) -> list[tuple[str, Rows]]:
    return [(name, result[key]) for name, result in sorted(results.items()) if result["role"] in roles and result.get(key)]


def curves_of(rows: Rows) -> dict[str, dict[float, float]]:
    """Debiased ICR by images seen, of each setting of rows that have several."""
    curves: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["images_seen"] > 0 and row.get("icr_debiased") is not None:
            curves.setdefault(row["what"], {})[row["images_seen"]] = row["icr_debiased"]
    return curves


def _turn(role: str) -> Callable[[Results], str]:
    def words(results: Results) -> str:
        rises: dict[str, float] = {}
        for key in ("levels", "layers", "noises"):
            for _, rows in _named(results, (role,), key):
                rises |= {what: list(curve.values())[-1] - min(curve.values()) for what, curve in curves_of(rows).items()}
        if not rises:
            return ""
        shown = ", ".join(f"{what} {value:.3f}" for what, value in rises.items())
        return (
            "Also tried on the first seed: other augmentations, layers and noise levels, as far as they were measured. "
            f"The rise of the debiased ICR from its lowest value to the end: {shown}."
        )

    return words


def _window(results: Results) -> str:
    parts = []
    for name, points in _named(results, (EDM_MANY, FLOW_MANY), "window"):
        measured = [p for p in points if p["icr_debiased"] is not None and p["accuracy"] is not None]
        if measured:
            best, lowest = max(p["accuracy"] for p in measured), min(measured, key=lambda p: p["icr_debiased"])
            spearman = correlation(*(np.array([p[key] for p in measured]) for key in ("icr_debiased", "accuracy")))
            parts.append(
                f"{name}: accuracy {lowest['accuracy']:.3f} at the lowest ICR, {best:.3f} at its own best, "
                f"Spearman of ICR and accuracy over noise {spearman:.2f}"
            )
    return f"Also measured: how much accuracy is lost at the lowest ICR. {'; '.join(parts)}." if parts else ""


def _lost_window(results: Results) -> str:
    parts = []
    for name, points in _named(results, (EDM_FEW, EDM_MANY), "window"):
        measured = [p for p in points if p["icr_debiased"] is not None and p["accuracy"] is not None]
        if measured:
            values = ", ".join(f"{p['sigma']:g}: {p['icr_debiased']:.3f} and {p['accuracy']:.2f}" for p in measured)
            parts.append(f"{name}, ICR and accuracy by sigma: {values}")
    return f"Also compared with the model of many images. {'; '.join(parts)}." if parts else ""


def _with(figure_key: str, roles: Sequence[str], against: str, what: str) -> Callable[[Results], str]:
    def words(results: Results) -> str:
        parts = []
        for name, rows in _named(results, roles, "trajectory"):
            _, a, b = series(rows, figure_key, against)
            parts.append(f"{name} {correlation(a, b):.2f}")
        return f"Also measured: {what}, Spearman's correlation: {', '.join(parts)}." if parts else ""

    return words


def _energies(results: Results) -> str:
    parts = []
    for name, rows in _named(results, (EDM_FEW, EDM_MANY), "trajectory"):
        _, invariant, residual = series(rows, "trace_invariant", "trace_residual")
        if len(invariant):
            parts.append(
                f"{name} invariant {invariant[0]:.3f} to {invariant[-1]:.3f}, residual {residual[0]:.3f} to {residual[-1]:.3f}"
            )
    return f"Also measured: both traces over the whole training. {'; '.join(parts)}." if parts else ""


def _pairs(key: str) -> Callable[[Results], str]:
    def words(results: Results) -> str:
        parts = []
        for _, rows in _named(results, (EDM_FEW,), key):
            curves = curves_of(rows)
            for a, b in combinations(curves, 2):
                steps = sorted(set(curves[a]) & set(curves[b]))
                value = correlation(*(np.array([curves[what][step] for step in steps]) for what in (a, b)))
                parts.append(f"{a} and {b} {value:.2f}")
        return f"Every two, Spearman's correlation: {', '.join(parts)}." if parts else ""

    return words


def _noise_energies(results: Results) -> str:
    parts = []
    for name, points in _named(results, (EDM_FEW, EDM_MANY, FLOW_MANY), "window"):
        values = ", ".join(f"{p['sigma']:g}: {p['trace_residual']:.3f}" for p in points if "trace_residual" in p)
        parts.append(f"{name}, residual trace by sigma: {values}")
    return f"Also measured: the other models. {'; '.join(parts)}." if parts else ""


TRIED: dict[int | str, Callable[[Results], str]] = {
    2: _window,
    3: _with("icr", (EDM_MANY,), "frechet_pixels", "the plug-in ICR in place of the debiased one"),
    4: _turn(EDM_FEW),
    5: _turn(FLOW_FEW),
    6: _with("neighbour_agreement", (EDM_FEW, EDM_MANY), "icr_debiased", "agreement and ICR over the whole training"),
    7: _energies,
    8: _noise_energies,
    9: _lost_window,
    10: _with("alignment", (EDM_MANY,), "trace_residual", "Alignment and the residual trace"),
    11: _with("icr_debiased", (EDM_FEW,), "copies", "ICR and copies over the whole training"),
    13: _pairs("levels"),
    14: _pairs("layers"),
}


def tried(figure: int | str, results: Results) -> str:
    """The paragraph of a figure; empty where nothing else was looked at."""
    return TRIED[figure](results) if figure in TRIED else ""

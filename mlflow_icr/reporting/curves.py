"""The charts of one run, and of several runs in common charts: which values are drawn together."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from mlflow_icr.monitoring.evidence import RATIOS
from mlflow_icr.reporting.charts import Curve, Frame, Mark, chart
from mlflow_icr.reporting.markup import Markup, images_text, joined
from mlflow_icr.reporting.material import RunMaterial
from mlflow_icr.reporting.pictures import spread

SPECTRA = 4  # measurements whose spectrum is drawn
SHARE = (0.0, 1.0)

ICR = Frame("Contamination of the features", "ICR (low is clean)")
RATIO = Frame("Error ratio of views", "error on views / on images", log_y=True)
FORECAST = Frame("Forecast: where copies are to be expected", "images seen", log_y=True)
COPIES = Frame("Copies among the samples", "share of samples", y_bounds=SHARE)
RESIDUAL = Frame("Residual energy along Fisher directions", "energy", log_y=True)


def curve_of(run: RunMaterial, key: str, name: str, colour: int = 0, *, dashed: bool = False) -> Curve:
    """A key of a run as a curve, with its interval where it has one."""
    points = run.of(key)
    bounds = [(step, run.bounds(key, step)) for step, _ in points]
    band = [(float(step), *interval) for step, interval in bounds if interval is not None]
    return Curve(name, [(float(step), value) for step, value in points], band, colour, key, dashed)


def marks_of(run: RunMaterial, colour: int = 0, word: str = "") -> list[Mark]:
    """The turn of a run with its bounds, and the onset of copies."""
    verdict, marks = run.verdict, []
    if verdict.turned_at is not None:
        marks.append(Mark(verdict.turned_at, f"turn{word}", verdict.low, verdict.high, colour))
    onset = run.summary.get("mem_onset_images_seen")
    if onset is not None:
        marks.append(Mark(onset, f"copies begin{word}", colour=colour, dotted=True))
    return marks


def _group(run: RunMaterial, frame: Frame, keys: Sequence[tuple[str, str]], marks: Sequence[Mark]) -> Markup | None:
    """A chart of the keys that the run has, or nothing."""
    present = [(key, name) for key, name in keys if run.of(key)]
    curves = [curve_of(run, key, name, i, dashed=i >= 4) for i, (key, name) in enumerate(present)]
    return chart(frame, curves, marks) if curves else None


def _matching(run: RunMaterial, pattern: str, name: Callable[[re.Match[str]], str]) -> list[tuple[str, str]]:
    matches = [(key, re.fullmatch(pattern, key)) for key in run.keys]
    return [(key, name(match)) for key, match in matches if match]


def _other_sections(run: RunMaterial) -> list[tuple[str, str]]:
    """ICR of the raw weights and at other noise levels: keys and names; empty if there is only `repr/`."""
    others = _matching(run, r"(repr[^/]+)/icr_debiased", lambda match: match[1].removeprefix("repr_").replace("_", " "))
    return [("repr/icr_debiased", "as above"), *others] if others else []


def run_charts(run: RunMaterial) -> Markup:
    """Every chart of one run, those that the verdict rests on first."""
    marks = marks_of(run)
    copies = _matching(run, r"mem/(?:ratio|copies)_(.+?)(?<!_low)(?<!_high)(?<!_train)", lambda match: _copy_name(match[0]))
    quality = [
        Frame(f"{name} distance of the samples", "distance (low is near)") for name in ("Kernel", "Frechet")
    ]  # fmt: skip
    distances = [
        _matching(run, rf"gen/{kind}(?!_gap)(_train)?_(.+?)(?<!_std)", lambda match: _distance_name(match[1], match[2]))
        for kind in ("kid", "fd")
    ]
    fidelity = [(f"gen/{name}", name) for name in ("precision", "recall", "density", "coverage")]
    losses = [("loss/train", "in training"), ("loss/train_eval", "training images"), ("loss/heldout", "held-out images")]
    traces = [("repr/trace_invariant", "shared by views"), ("repr/trace_residual", "not shared")]
    fisher = [("repr/fisher_invariant_energy", "shared by views"), ("repr/fisher_residual_energy", "not shared (residual)")]
    nearer = "repr/near_error_ratio" if run.of("repr/near_error_ratio") else "repr/view_error_ratio"
    ratios = [("repr/far_error_ratio", "far views, which the verdict reads"), (nearer, "near views")]
    parts = [
        _group(run, ICR, [("repr/icr_debiased", "debiased, with 95 % interval"), ("repr/icr", "plug-in")], marks),
        _group(run, RATIO, ratios, marks),
        _group(run, FORECAST, [("forecast/images_seen", "expected, with 80 % interval")], marks),
        _group(run, COPIES, copies, marks),
        _group(run, Frame("Energy of the features", "energy", log_y=True), traces, marks),
        _group(run, Frame("Energy along Fisher directions", "energy", log_y=True), fisher, marks),
        spectrum_chart(run),
        _group(run, Frame("ICR of other weights and noise levels", "ICR, debiased"), _other_sections(run), marks),
        *(_group(run, frame, keys, marks) for frame, keys in zip(quality, distances, strict=True)),
        _group(run, Frame("Fidelity and diversity", "value (high is good)"), fidelity, marks),
        _group(run, Frame("Loss", "loss", log_y=True), losses, marks),
    ]
    return joined([part for part in parts if part is not None])


def _copy_name(key: str) -> str:
    kind, _, encoder = key.removeprefix("mem/").partition("_")
    name = "pixels" if encoder == "l2" else encoder.replace("_", " ")
    return f"{'distance ratio' if kind == 'ratio' else 'similarity'}, {name}"


def _distance_name(train: str | None, encoder: str) -> str:
    return f"to {'training' if train else 'held-out'} images, {encoder.replace('_', ' ')}"


def spectrum_chart(run: RunMaterial) -> Markup | None:
    """Invariant over residual energy along each direction, largest first, at a few measurements; None where none was kept."""
    curves = []
    for colour, step in enumerate(spread(list(run.eigenvalues), SPECTRA)):
        try:
            values = np.sort(np.asarray(run.eigenvalues[step](), dtype=float))[::-1]
        except (OSError, ValueError, KeyError):
            continue
        points = [(float(place), float(value)) for place, value in enumerate(values, 1) if np.isfinite(value)]
        curves.append(Curve(f"{images_text(step)} images seen", points, colour=colour))
    if not curves:
        return None
    frame = Frame(
        "Spectrum", "shared / not shared", log_y=True, x_label="direction, by size; those below 0 are not drawn", x_unit=1,
        log_x=False,
    )  # fmt: skip
    return chart(frame, curves)


def _ratio_of(run: RunMaterial) -> str:
    return run.ratio_key if run.ratio_key in RATIOS else RATIOS[-1]  # an excess is no ratio


def comparison_charts(runs: Sequence[RunMaterial], colours: Sequence[int]) -> Markup:
    """The charts of the values that decide, with all runs."""
    few = len(runs) <= 3  # more marks than that cover the curves
    marks = [mark for run, colour in zip(runs, colours, strict=True) for mark in (marks_of(run, colour) if few else [])]
    parts = []
    frames = (
        (ICR, "icr"),
        (RATIO, "ratio"),
        (COPIES, "mem/ratio_l2"),
        (RESIDUAL, "repr/fisher_residual_energy"),
    )
    for frame, key in frames:
        curves = [
            curve_of(run, {"icr": run.icr_key, "ratio": _ratio_of(run)}.get(key, key), run.name, colour)
            for run, colour in zip(runs, colours, strict=True)
        ]
        if any(curve.points for curve in curves):
            parts.append(chart(frame, curves, marks, named=len(set(colours)) == len(runs)))
    return joined(parts)

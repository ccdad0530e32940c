"""The window of noise levels on trained models of Fashion-MNIST: its results in docs/validation/, and their table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from mlflow_icr import NoiseSweep
from mlflow_icr.monitoring.sweep import SweepPoint
from trainers.experiments import noise_window

ARGUMENTS = ("--preset=fashion-mnist-28", "--control-images=20000")
RESULTS, PICTURE = "noise_window.json", "noise_window.png"


def train_missing(docs: Path, work_dir: Path) -> bool:
    """Train and sweep if the results are missing; returns whether they exist then. Continues a study that has been trained."""
    results = docs / "validation" / RESULTS
    if results.exists():
        return True
    folder = work_dir / "noise_window"
    trained = (folder / "study.png").exists()
    if noise_window.main([f"--study-dir={folder}"] if trained else [*ARGUMENTS, f"--output-dir={folder}"]):
        return False
    shutil.copy(folder / RESULTS, results)
    shutil.copy(folder / PICTURE, docs / "images" / PICTURE)
    return True


def read_sweeps(path: Path) -> dict[str, NoiseSweep]:
    """The sweeps of a results file by the names of their models."""
    content = json.loads(path.read_text())
    return {
        name: NoiseSweep(tuple(SweepPoint(**point) for point in entry["points"]), entry["num_images"], entry["num_views"])
        for name, entry in content.items()
    }


def window_rows(sweeps: Mapping[str, NoiseSweep]) -> list[list[str]]:
    """For each model and layer: where ICR is lowest and the probe best, how far apart, and whether ICR is a U."""
    rows = []
    for name, sweep in sweeps.items():
        for layer in sweep.layers:
            star, accurate = sweep.sigma_star(layer), sweep.most_accurate_sigma(layer)
            steps = (
                "-" if star is None or accurate is None else str(abs(sweep.sigmas.index(star) - sweep.sigmas.index(accurate)))
            )
            points = {p.sigma: p for p in sweep.of(layer)}
            first, lowest = points[sweep.sigmas[0]], None if star is None else points[star].icr
            rise = "-" if first.rise is None or first.rise_low is None else f"{first.rise:.3f} (at least {first.rise_low:.3f})"
            best = None if accurate is None else points[accurate].accuracy
            accuracy_at_star = None if star is None else points[star].accuracy
            lost = "-" if best is None or accuracy_at_star is None else f"{best - accuracy_at_star:.3f}"
            rows.append([
                name, layer, "-" if star is None else f"{star:g}", "-" if lowest is None else f"{lowest:.3f}", rise,
                "yes" if sweep.has_window(layer) else "no", "-" if accurate is None else f"{accurate:g}",
                "-" if best is None else f"{best:.3f}", steps, lost,
            ])  # fmt: skip
    return rows


HEAD = (
    "model", "layer", "ICR lowest at sigma", "its value", "ICR above it at the smallest sigma", "a window",
    "probe best at sigma", "its accuracy", "steps apart", "less accurate where ICR is lowest by",
)  # fmt: skip

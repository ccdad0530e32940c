"""Where to look: ICR and probe accuracy over sigma and layers, of a model on many images and of one before and after its turn.

The window of noise levels in which features are cleanest should be there in a model that generalizes, and gone in one that has
learned its images by heart (Li et al. 2026, figures 2 and 9).
"""

from __future__ import annotations

import csv
import json
import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from mlflow_icr import NoiseSweep, sweep_noise, verdict
from mlflow_icr.extraction.pipelines import load_denoiser
from mlflow_icr.monitoring.plots import sweep_figure
from mlflow_icr.monitoring.sweep import SweepPoint
from trainers.config import TrainConfig
from trainers.data import data_of
from trainers.experiments.generalization_to_memorization import Study, plan, run_study
from trainers.train import Stop

MOST_IMAGES = 2000  # of the control: enough for intervals of a hundredth
LAYER = "up_blocks.0"  # `decoder`, the layer that the runs are monitored at


def checkpoints(study: Study) -> dict[str, Path]:
    """The models to compare, by what they are: the control's last, the limited run's at its turn and its last."""
    found = {}
    for role in study.configs:
        last = sorted((study.folder / role / "checkpoints").glob("[0-9]*"))[-1]
        if role == "limited":
            turn = verdict(study.folder / role)
            if turn.turning_images_seen is not None:
                found[f"limited, at its turn ({turn.checkpoint_images_seen:,})"] = last.with_name(
                    f"{turn.checkpoint_images_seen:012d}"
                )
        found[f"{role}, at the end ({int(last.name):,})"] = last
    return dict(sorted(found.items()))


def sweep_checkpoint(folder: Path, config: TrainConfig) -> NoiseSweep:
    """The sweep of one checkpoint on its own training images; the probe is scored on the held-out ones."""
    denoiser, _ = load_denoiser(folder)
    data = data_of(config)
    n = min(MOST_IMAGES, len(data.train))
    if data.train_labels is None:
        return sweep_noise(denoiser, data.train[:n])
    return sweep_noise(
        denoiser,
        data.train[:n],
        labels=data.train_labels[:n],
        test_images=data.heldout[:MOST_IMAGES],
        test_labels=None if data.heldout_labels is None else data.heldout_labels[:MOST_IMAGES],
    )


def write(study: Study, sweeps: Mapping[str, NoiseSweep]) -> list[Path]:
    """Figure, table and conclusions in the study's folder."""
    picture, sheet, said = (study.folder / f"noise_window.{suffix}" for suffix in ("png", "csv", "json"))
    sweep_figure(sweeps, LAYER).savefig(picture, dpi=130)
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["model", *(field.name for field in fields(SweepPoint))])
        writer.writeheader()
        writer.writerows({"model": name} | asdict(point) for name, sweep in sweeps.items() for point in sweep.points)
    said.write_text(json.dumps({name: sweep.as_dict() for name, sweep in sweeps.items()}, indent=2) + "\n")
    return [picture, sheet, said]


def text(sweeps: Mapping[str, NoiseSweep]) -> str:
    """Two lines for each model: what its best layer and the monitored layer show."""
    lines = []
    for name, sweep in sweeps.items():
        for layer in dict.fromkeys([sweep.best_layer, LAYER]):
            if layer in sweep.layers:
                accurate = sweep.most_accurate_sigma(layer)
                lines.append(
                    f"{name}: {layer}{' (best layer)' if layer == sweep.best_layer else ''}: lowest ICR at sigma "
                    f"{sweep.sigma_star(layer):g}, {'a window' if sweep.has_window(layer) else 'no window'}"
                    + ("" if accurate is None else f", probe best at sigma {accurate:g}")
                )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line of `generalization_to_memorization`, then sweep what it left; returns the exit status."""
    from mlflow_icr.tracking import MLflowSink

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        study = plan(argv)
    except (ValueError, OSError) as error:
        print(f"noise_window: error: {error}", file=sys.stderr)
        return 2
    stop = Stop()
    try:
        status = run_study(study, stop)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if status:
        return status
    roles = {name: study.configs[name.split(",")[0]] for name in checkpoints(study)}
    sweeps = {name: sweep_checkpoint(folder, roles[name]) for name, folder in checkpoints(study).items()}
    files = write(study, sweeps)
    sink = MLflowSink(run_name=f"{study.name} noise window")
    sink.bind(study.folder / "noise_window")
    sink.open({}, {"role": "noise_window", "study_name": study.name})
    for path in files:
        sink.artifact(str(path))
    sink.close("FINISHED")
    print(f"\n{text(sweeps)}\n\nfigure       {files[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

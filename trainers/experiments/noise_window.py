"""ICR and probe accuracy over sigma and layers, of a model on many images, and of one before and after its turn.

The window of noise levels in which features are cleanest should be there in a model that generalizes, and gone in one that has
learned its images by heart (Li et al. 2026, figures 2 and 9). Takes the command line of generalization_to_memorization; with
--study-dir it trains nothing, and sweeps the runs that are in that folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mlflow_icr import LabelledImages, NoiseSweep, sweep_noise, verdict
from mlflow_icr.arguments import OneLineParser, dashed
from mlflow_icr.extraction.pipelines import load_denoiser
from mlflow_icr.extraction.taps import Tap
from mlflow_icr.monitoring.plots import sweep_figure
from mlflow_icr.monitoring.sweep import SweepPoint
from mlflow_icr.tracking.checkpoints.folder import checkpoints
from trainers.config import TrainConfig, config_from, read_values
from trainers.data import data_of
from trainers.experiments.demo import plan, run_study
from trainers.train import CONFIG, Stop

MOST_IMAGES = 2000  # of each kind: enough for intervals of a hundredth


@dataclass(frozen=True)
class Runs:
    """Runs that are over, in the folder of their study: the configuration of each by its role there."""

    name: str
    folder: Path
    configs: Mapping[str, TrainConfig]


def runs_in(folder: Path) -> Runs:
    """The runs in a study's folder. Raises ValueError where there are none."""
    paths = sorted(folder.glob(f"*/{CONFIG}"))
    if not paths:
        raise ValueError(f"study_dir is {str(folder)!r}; expected a folder with those of runs, each with its {CONFIG}")
    return Runs(folder.name, folder, {path.parent.name: config_from(read_values(path)) for path in paths})


def models(runs: Runs) -> dict[str, tuple[str, Path]]:
    """Role and checkpoint of the models to compare, by their description: each run's last, and the one at an earlier turn."""
    entries = {}
    for role in sorted(runs.configs):
        saved, turn = checkpoints(runs.folder / role), verdict(runs.folder / role)
        last, kept = max(saved, default=None), turn.checkpoint_images_seen
        if turn.turned_at is not None and kept in saved and kept != last:
            entries[f"{role}, at its turn ({kept:,})"] = role, saved[kept]
        if last is not None:
            entries[f"{role}, at the end ({last:,})"] = role, saved[last]
    return entries


def labelled_images(config: TrainConfig) -> LabelledImages | None:
    """The images that all models' probes learn from and are scored on: the largest run's, and held-out ones if any."""
    data = data_of(config)
    if data.train_labels is None:
        return None
    sets = [data.train, data.train_labels]
    if data.heldout_labels is not None and len(data.heldout):  # else the probe is cross-validated
        sets += [data.heldout, data.heldout_labels]
    return LabelledImages(*(part[:MOST_IMAGES] for part in sets))


def sweep_all(runs: Runs) -> tuple[dict[str, NoiseSweep], str]:
    """The sweep of each model, ICR on its own training images; and the layer that the runs are monitored at."""
    labelled = labelled_images(max(runs.configs.values(), key=lambda config: config.data.num_images))
    sweeps, monitored = {}, ""
    for name, (role, folder) in models(runs).items():
        denoiser, _ = load_denoiser(folder)
        config = runs.configs[role]
        with Tap(denoiser.network, config.monitor.layer) as tap:
            (monitored,) = tap.layers
        sweeps[name] = sweep_noise(denoiser, data_of(config).train[:MOST_IMAGES], labelled=labelled)
    return sweeps, monitored


def write(runs: Runs, sweeps: Mapping[str, NoiseSweep], layer: str) -> list[Path]:
    """Figure, table and conclusions in the study's folder."""
    picture, sheet, conclusions = (runs.folder / f"noise_window.{suffix}" for suffix in ("png", "csv", "json"))
    sweep_figure(sweeps, layer).savefig(picture, dpi=130)
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["model", *(field.name for field in fields(SweepPoint))])
        writer.writeheader()
        writer.writerows({"model": name} | asdict(point) for name, sweep in sweeps.items() for point in sweep.points)
    conclusions.write_text(json.dumps({name: sweep.as_dict() for name, sweep in sweeps.items()}, indent=2) + "\n")
    return [picture, sheet, conclusions]


def text(sweeps: Mapping[str, NoiseSweep], layer: str) -> str:
    """Lines for each model: what its best layer and the monitored layer show."""
    lines = []
    for name, sweep in sweeps.items():
        for block in dict.fromkeys([sweep.best_layer, layer]):
            if block in sweep.layers:
                accurate = sweep.most_accurate_sigma(block)
                lines.append(
                    f"{name}: {block}{' (best layer)' if block == sweep.best_layer else ''}: lowest ICR at sigma "
                    f"{sweep.sigma_star(block):g}, {'a window' if sweep.has_window(block) else 'no window'}"
                    + ("" if accurate is None else f", probe best at sigma {accurate:g}")
                )
    return "\n".join(lines)


def conclude(runs: Runs) -> None:
    """Sweep the runs' models, print the results, and log them to an MLflow run of their own."""
    from mlflow_icr.tracking import MLflowSink, Tracker

    sweeps, layer = sweep_all(runs)
    files = write(runs, sweeps, layer)
    tracker = Tracker(runs.folder / "noise_window", [MLflowSink(run_name=f"{runs.name} noise window")], resume="allow")
    tracker.open({}, {"role": "noise_window", "study_name": runs.name})
    for path in files:
        tracker.artifact(path)
    tracker.close("FINISHED")
    print(f"\n{text(sweeps, layer)}\n\nfigure       {files[0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    parser = OneLineParser(
        prog="noise_window",
        description="Train the two models of trainers.experiments.demo, then measure ICR and probe accuracy over noise "
        "levels and layers. All flags of trainers.experiments.demo are allowed too.",
        epilog="example:\n  python -m trainers.experiments.noise_window --preset fashion-mnist-28 --total-kimg 220",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--study-dir", type=Path, metavar="DIR", help="measure the trained runs in this folder; train nothing")
    arguments, others = parser.parse_known_args(dashed(sys.argv[1:] if argv is None else argv))
    try:
        if arguments.study_dir is not None:
            conclude(runs_in(arguments.study_dir))
            return 0
        study = plan(others)
    except (ValueError, OSError) as error:
        print(f"noise_window: error: {error}", file=sys.stderr)
        return 2
    try:
        status = run_study(study, Stop())
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if status == 0:
        conclude(Runs(study.name, study.folder, study.configs))
    return status


if __name__ == "__main__":
    sys.exit(main())

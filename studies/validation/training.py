"""One run of the validation study, in this process: `python -m studies.validation.training NAME --work-dir DIR ...`.

It is trained by `trainers.run.Run`, as `trainers.train` does, with the journal alone: no MLflow, no event files, no report.
Stopped by a signal, or killed, it resumes from its last checkpoint when it is called again.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow_icr.arguments import OneLineParser
from mlflow_icr.monitoring.series import HISTORY, read_history
from mlflow_icr.tracking import Tracker
from mlflow_icr.tracking.checkpoints.folder import checkpoints
from studies.validation.results import Result, write_result
from studies.validation.runs import Plan, PlannedRun, config_of, read_plan, select
from trainers.checkpoint import latest_checkpoint
from trainers.config import TrainConfig
from trainers.console import Console
from trainers.run import Run
from trainers.train import Stop

KEPT_PARAMS = (
    "num_parameters",
    "feature_dim",
    "probe_images",
    "probe_views",
    "protocol_digest",
    "data_sha256",
    "torch_version",
)


class StoppedError(Exception):
    """A signal asked the training to stop; it has saved."""


def images_seen(folder: Path) -> int:
    """Images seen at the checkpoint from which a run resumes; 0 before there is one."""
    checkpoint = latest_checkpoint(folder)
    return 0 if checkpoint is None else int(checkpoint.name)


def _train_until(config: TrainConfig, folder: Path, stop: Stop, until: float) -> dict[str, Any]:
    """Train to the end, or up to so many images seen; returns the run's parameters. Raises StoppedError."""
    run = Run(config, folder, resume=(folder / HISTORY).exists())
    run.monitor.pictures = run.generation.pictures = False  # they are not looked at
    tracker = Tracker(folder, [], resume="allow")
    tracker.open(run.params(), {})
    try:
        run.train_to_end(
            tracker, Console(config, shown=False), lambda: stop.signal is not None or run.state.images_seen >= until
        )
    finally:
        tracker.close("FINISHED")
        run.end()
    if stop.signal is not None:
        raise StoppedError
    return run.params()


def _network_before(run: PlannedRun, plan: Plan, folder: Path, stop: Stop) -> Path:
    """The checkpoint that a run begins with, trained if it is missing; it is measured twice, without samples."""
    assert run.before is not None
    config = config_of(run.before, plan, measurements=2, first_measurement_kimg=run.before["total_kimg"], num_samples=8)
    last = -(-config.total_images // int(run.before["batch_size"])) * int(run.before["batch_size"])
    if last not in checkpoints(folder):
        _train_until(config, folder, stop, float("inf"))
    return checkpoints(folder)[last]


def train(run: PlannedRun, plan: Plan, work: Path, results: Path, stop: Stop) -> Path:
    """Train a run from where it is to its end and keep its result; returns its file. Raises StoppedError."""
    folder, others = work / run.name, {}
    if run.before is not None:
        others["init_from"] = str(_network_before(run, plan, work / f"{run.name}.before", stop))
    params: Mapping[str, Any] = {}
    changes = [*run.changes, {"at_kimg": float("inf")}]
    for i, change in enumerate(changes):
        until = change["at_kimg"] * 1000
        if images_seen(folder) < until:
            changed = {key: value for entry in changes[:i] for key, value in entry.items() if key != "at_kimg"}
            params = _train_until(config_of(run.options, plan, **others, **changed), folder, stop, until)
    if not params:  # a kill came between the last step and its result
        params = _train_until(config_of(run.options, plan, **others), folder, stop, float("inf"))
    kept = {key: params[key] for key in KEPT_PARAMS if key in params}
    path = write_result(results, Result(run.name, run.factors, kept, read_history(folder)))
    for state in folder.glob("checkpoints/*/state.safetensors"):  # a finished training does not resume from it
        state.unlink()
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input, 128 + signal when stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    parser = OneLineParser(prog="validation.training", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", help="name of a run in plan.json")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--results-dir", type=Path, required=True)
    parser.add_argument("--shortened", type=float, default=1.0, help="train to this share of its length: a rehearsal")
    arguments = parser.parse_args(argv)
    stop = Stop()
    try:
        plan = select(read_plan(), [arguments.name])
        run = plan.runs[0]
        options = {key: v * arguments.shortened if key.endswith("_kimg") else v for key, v in run.options.items()}
        train(replace(run, options=options), plan, arguments.work_dir, arguments.results_dir, stop)
    except StoppedError:
        return 128 + (stop.signal or signal.SIGTERM)
    except (ValueError, OSError) as error:
        print(f"validation.training: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

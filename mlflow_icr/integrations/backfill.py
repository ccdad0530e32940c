"""A training that has ended, measured on its checkpoints: into a folder of its own, and into its MLflow run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow_icr.extraction.images import ImageFiles
from mlflow_icr.integrations.checkpoint_measurement import SETTINGS, CheckpointMeasurement, check_output, line_of
from mlflow_icr.integrations.saved import SavedCheckpoint, SavedTraining, Units, find_checkpoints, place_of
from mlflow_icr.monitoring import Protocol, Verdict, verdict
from mlflow_icr.tracking import Tracker
from mlflow_icr.tracking.backfill import BackfillMLflowSink, BackfillTensorBoardSink, is_delivered
from mlflow_icr.tracking.mlflow.store import connect, get_run

Say = Callable[[str], None]


@dataclass
class Backfill:
    """What was done: steps measured now, steps that had been, reasons by name for what was left out.

    `complete` says whether the MLflow run, where there is one, has everything.
    """

    output_dir: Path
    verdict: Verdict
    measured: list[int] = field(default_factory=list)
    known: list[int] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    complete: bool = True


def measure_checkpoints(
    folder: Path | str,
    data: Path | str,
    output_dir: Path | str | None = None,
    *,
    pipeline: Path | str | None = None,
    run_id: str | None = None,
    images_per_step: int = 1,
    images_per_epoch: int | None = None,
    protocol: Protocol | None = None,
    companions: Sequence[str] = (),
    batch_size: int | None = None,
    say: Say = lambda text: None,
    **options: Any,
) -> Backfill:
    """Measure every checkpoint in a folder on the same views of the same images, in order; resumes where it was cut off.

    `data` is the folder of training images. Results go to `output_dir` (None: `icr` in the folder), its journal and event
    files, and with `run_id` to that MLflow run too, at the checkpoints' steps and times, each once as often as this is called.
    `pipeline` is what the training began with, where the folder does not hold it; `options` are those of `load_pipeline`.
    `images_per_epoch` None is the number of training images. Checkpoints that cannot be read are left out, and named. Raises
    ValueError for input that does not fit, before anything is measured, and OSError for a store that does not answer.
    """
    folder = Path(folder)
    units = Units(images_per_step, len(ImageFiles(data)) if images_per_epoch is None else images_per_epoch)
    checkpoints = find_checkpoints(folder, units, say)
    if run_id is not None:  # known before anything is loaded
        get_run(connect(), run_id)
    out = folder / "icr" if output_dir is None else Path(output_dir)
    check_output(out)
    training = SavedTraining(place_of(checkpoints[0].files) if pipeline is None else pipeline, **options)
    measurement = CheckpointMeasurement(
        training,
        data,
        out,
        units=units,
        protocol=protocol,
        companions=companions,
        batch_size=batch_size,
        options=options,
    )
    tracker = Tracker(out, _sinks(out, run_id, checkpoints, measurement.monitor.protocol.digest))
    tracker.journal.write_file(SETTINGS, json.dumps(measurement.settings).encode())
    found = Backfill(out, tracker.verdict)
    due = _due(checkpoints, tracker, found)
    delivered = run_id is None or is_delivered(out, run_id, tracker.journal.rows)
    if delivered and not due:
        return found
    tracker.open(measurement.params, {"icr.backfilled": "true"})
    try:
        for checkpoint in due:
            try:
                report = measurement.measure(checkpoint, tracker)
            except ValueError as error:
                found.left_out[checkpoint.name] = str(error)
                continue
            found.measured.append(checkpoint.step)
            say(line_of(checkpoint.name, report))
    finally:
        tracker.close("FINISHED")
        found.complete = all(_has_everything(sink) for sink in tracker.sinks)
    found.verdict = verdict(tracker.journal.rows)
    return found


def _sinks(out: Path, run_id: str | None, checkpoints: Sequence[SavedCheckpoint], digest: str) -> list[Any]:
    times = {checkpoint.step: checkpoint.time for checkpoint in checkpoints}
    sinks: list[Any] = [BackfillTensorBoardSink(out / "tensorboard", times)]
    return sinks if run_id is None else [BackfillMLflowSink(run_id, times, digest), *sinks]


def _due(checkpoints: Sequence[SavedCheckpoint], tracker: Tracker, found: Backfill) -> list[SavedCheckpoint]:
    """What is still to be measured; steps that were measured are noted, and so is what comes too late."""
    steps, due = tracker.journal.steps, []
    newest = max(steps, default=-1)
    for checkpoint in checkpoints:
        if checkpoint.step in steps:
            found.known.append(checkpoint.step)
        elif checkpoint.step < newest:
            found.left_out[checkpoint.name] = (
                f"step {newest} was measured before it, and growth and rise are relative to earlier steps; another output_dir "
                "takes all"
            )
        else:
            due.append(checkpoint)
    return due


def _has_everything(sink: Any) -> bool:
    return not isinstance(sink, BackfillMLflowSink) or (
        sink.outbox is not None and not sink.outbox.waiting and not sink.outbox.refused
    )

"""Measure the checkpoints of a finished training, into a folder and into its MLflow run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow_icr.extraction.images import ImageFiles
from mlflow_icr.integrations.checkpoint_measurement import SETTINGS, CheckpointMeasurement, check_output, line_of
from mlflow_icr.integrations.saved import SavedCheckpoint, SavedTraining, Units, find_checkpoints, place_of
from mlflow_icr.monitoring import Protocol, Report, Verdict, verdict
from mlflow_icr.tracking import MLflowSink, TensorBoardSink, Tracker
from mlflow_icr.tracking.mlflow.store import answers, connect, get_run
from mlflow_icr.tracking.mlflow.sync import waiting_of

SECTIONS = ("repr", "perf/measure")  # prefixes of a measurement's keys
Echo = Callable[[str], None]


@dataclass
class Backfill:
    """The result: steps that were measured now, steps that had been before, and reasons by name for those left out.

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
    echo: Echo = lambda text: None,
    **options: Any,
) -> Backfill:
    """Measure every checkpoint in a folder on the same views of the same images, in order; resumes after an interruption.

    `data` is the folder of training images. Results go to `output_dir` (None: `icr` in the folder), its journal and event
    files, and with `run_id` to that MLflow run too, at the checkpoints' steps and times. Repeated calls add nothing twice.
    `pipeline` is what the training began with, if the folder does not hold it; `options` are those of `load_pipeline`.
    `images_per_epoch` None is the number of training images. Checkpoints that cannot be read are left out and named. Raises
    ValueError for input that does not fit, before anything is measured, and OSError for a store that does not answer.
    """
    folder = Path(folder)
    units = Units(images_per_step, len(ImageFiles(data)) if images_per_epoch is None else images_per_epoch)
    left_out: dict[str, str] = {}
    checkpoints = find_checkpoints(folder, units, echo, left_out)
    if run_id is not None:  # checked before anything is loaded
        get_run(connect(), run_id)
    out = folder / "icr" if output_dir is None else Path(output_dir)
    check_output(out, data)
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
    delivered = run_id is None or _is_delivered(out, run_id)
    tracker = Tracker(out, _sinks(out, run_id, measurement.monitor.protocol.digest), resume="allow")
    tracker.journal.write_file(SETTINGS, json.dumps(measurement.settings).encode())
    result = Backfill(out, tracker.verdict, left_out=left_out)
    due = _due(checkpoints, tracker, result)
    if delivered and not due:
        tracker.abandon()
        return result
    tracker.open(measurement.params, {"icr.backfilled": "true"})
    try:
        for checkpoint in due:
            try:
                report = measurement.measure(checkpoint, tracker, time=checkpoint.time)
            except ValueError as error:
                result.left_out[checkpoint.name] = str(error)
                continue
            result.measured.append(checkpoint.step)
            echo(line_of(checkpoint.name, report))
    finally:
        tracker.close("FINISHED")
        result.complete = run_id is None or waiting_of(out).complete
    result.verdict = verdict(tracker.journal.rows)
    return result


def _sinks(out: Path, run_id: str | None, digest: str) -> list[Any]:
    sinks: list[Any] = [TensorBoardSink(out)]
    return sinks if run_id is None else [MLflowSink(run_id=run_id, joins=True, known=measured_in(run_id, digest)), *sinks]


def measured_in(run_id: str, protocol_digest: str) -> dict[int, set[str]]:
    """Keys of measurements by step that a run in MLflow has.

    Raises ValueError for a run that does not exist, or that was measured by another protocol, OSError where the store does not
    answer.
    """
    client = connect()
    run = get_run(client, run_id)
    digest = run.data.params.get("protocol_digest", protocol_digest)
    if digest != protocol_digest:
        raise ValueError(
            f"run_id is {run_id!r}, a run that was measured by the protocol {digest}, and this is {protocol_digest}: values "
            "of two cannot be compared; expected another run, or none"
        )
    keys_by_step: dict[int, set[str]] = {}
    with answers():
        for key in run.data.metrics:
            if key.startswith(SECTIONS):
                for point in client.get_metric_history(run_id, key):
                    keys_by_step.setdefault(point.step, set()).add(key)
    return keys_by_step


def add_to_run(sink: MLflowSink, report: Report, params: Mapping[str, object]) -> None:
    """Log one report to the run of a sink, and wait until the store has it.

    Raises ValueError for a run that refuses it, OSError if the store does not answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        tracker = Tracker(folder, [sink], mode="online")
        tracker.quiet = True
        tracker.open(params, {})
        tracker.show(report)
        complete = tracker.flush()
        failure, refused = sink.failure, list(sink.state.refused.values())
        tracker.abandon()
    if not complete:
        why = refused[0]["why"] if refused else "" if failure is None else sink.reason_of(failure)
        raise OSError(f"the run {sink.run_id} does not take the results: {why}")


def _is_delivered(out: Path, run_id: str) -> bool:
    """Whether a run has all results of a folder. Raises ValueError for a folder whose results go to another run."""
    waiting = waiting_of(out)
    if waiting.run_id not in (None, run_id):
        raise ValueError(f"run_id is {run_id!r}, and the results in {str(out)!r} go to {waiting.run_id}; expected that one")
    return waiting.run_id is not None and waiting.complete


def _due(checkpoints: Sequence[SavedCheckpoint], tracker: Tracker, result: Backfill) -> list[SavedCheckpoint]:
    """The checkpoints that are still to be measured; measured steps, and those that come too late, are recorded."""
    steps, due = tracker.journal.steps, []
    newest = max(steps, default=-1)
    for checkpoint in checkpoints:
        if checkpoint.step in steps:
            result.known.append(checkpoint.step)
        elif checkpoint.step < newest:
            result.left_out[checkpoint.name] = (
                f"step {newest} was measured before it, and growth and rise are relative to earlier steps; in another "
                "output_dir all are measured"
            )
        else:
            due.append(checkpoint)
    return due

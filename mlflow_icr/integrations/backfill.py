"""A training that has ended, measured on its checkpoints: into a folder of its own, and into its MLflow run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow_icr.extraction.adapters.choose import image_channels
from mlflow_icr.extraction.images import content_hash, folder_labels, load_folder, with_channels
from mlflow_icr.extraction.pipelines import batch_size_for
from mlflow_icr.integrations.saved import SavedCheckpoint, SavedTraining, find_checkpoints
from mlflow_icr.integrations.watch import MONITOR_STATE, described, load_state, state_of
from mlflow_icr.monitoring import ICRMonitor, Protocol, Verdict, verdict
from mlflow_icr.monitoring.series import HISTORY
from mlflow_icr.tracking import Tracker, check_folder
from mlflow_icr.tracking.backfill import BackfillMLflowSink, BackfillTensorBoardSink, is_delivered
from mlflow_icr.tracking.mlflow.store import connect, get_run

SETTINGS = "backfill.json"  # what makes a folder's measurements comparable, and a later one go on with them
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
    Checkpoints that cannot be read are left out, and named. Raises ValueError for input that does not fit, before anything is
    measured, and OSError for a store that does not answer.
    """
    folder = Path(folder)
    checkpoints = find_checkpoints(folder, images_per_step, say)
    if run_id is not None:  # known before anything is loaded
        get_run(connect(), run_id)
    out = folder / "icr" if output_dir is None else Path(output_dir)
    settings = _settings_of(out)
    training = SavedTraining(checkpoints, pipeline, **options)
    images = with_channels(load_folder(data, training.side), image_channels(training.denoiser))
    monitor = ICRMonitor(
        training.denoiser,
        images,
        protocol,
        companions=companions,
        labels=folder_labels(data),
        batch_size=batch_size or batch_size_for(training.denoiser),
    )
    mine = {
        "protocol_digest": monitor.protocol.digest,
        "probe_sha256": content_hash(monitor.reader.images),
        "images_per_step": images_per_step,
        "dtype": options.get("dtype", "float32"),
        "prompt": options.get("prompt", ""),
        "class_label": options.get("class_label"),
    }
    _check_settings(out, settings, mine)
    load_state(out, monitor)
    tracker = Tracker(out, _sinks(out, run_id, checkpoints, monitor.protocol.digest))
    tracker.journal.write_file(SETTINGS, json.dumps(mine).encode())
    found = Backfill(out, tracker.verdict)
    due = _due(checkpoints, tracker, found)
    delivered = run_id is None or is_delivered(out, run_id, tracker.journal.rows)
    if delivered and not due:
        return found
    tracker.open({**described(monitor, training.denoiser), "images_per_step": images_per_step}, {"icr.backfilled": "true"})
    try:
        for checkpoint in due:
            _measure(training, checkpoint, monitor, tracker, found, say)
    finally:
        tracker.close("FINISHED")
        found.complete = all(_has_everything(sink) for sink in tracker.sinks)
    found.verdict = verdict(tracker.journal.rows)
    return found


def _settings_of(out: Path) -> Mapping[str, Any] | None:
    """The settings of a folder that holds measurements of checkpoints. Raises ValueError where it holds another run."""
    path = out / SETTINGS
    if path.is_file():
        return json.loads(path.read_text())
    check_folder(out, resume=False)
    return None


def _check_settings(out: Path, there: Mapping[str, Any] | None, mine: Mapping[str, Any]) -> None:
    if there is None or not (out / HISTORY).exists():
        return
    for key in sorted({*there, *mine}):
        if there.get(key) != mine.get(key):
            raise ValueError(
                f"{key} is {mine.get(key)!r}, but {str(out)!r} was measured with {there.get(key)!r}; expected the same, or "
                "another output_dir"
            )


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
            found.left_out[checkpoint.folder.name] = (
                f"step {newest} was measured before it, and growth and rise are relative to earlier steps; another output_dir "
                "takes all"
            )
        else:
            due.append(checkpoint)
    return due


def _measure(
    training: SavedTraining, checkpoint: SavedCheckpoint, monitor: ICRMonitor, tracker: Tracker, found: Backfill, say: Say
) -> None:
    name = checkpoint.folder.name
    try:
        training.load(checkpoint)
    except ValueError as error:
        found.left_out[name] = str(error)
        return
    report = monitor.measure(checkpoint.step)
    # Before the row: measured again after a kill between the two, this step finds itself, and gives the same values.
    tracker.journal.write_file(MONITOR_STATE, state_of(monitor))
    tracker.record(report)
    found.measured.append(checkpoint.step)
    shown = {key: report.values.get(f"repr/{key}") for key in ("icr", "icr_debiased", "view_error_ratio")}
    values = ", ".join(f"{key} {value:.4g}" for key, value in shown.items() if value is not None)
    say(f"{name}: step {checkpoint.step}, {values or 'nothing could be measured'}")


def _has_everything(sink: Any) -> bool:
    return not isinstance(sink, BackfillMLflowSink) or (
        sink.outbox is not None and not sink.outbox.waiting and not sink.outbox.refused
    )

"""Find the checkpoint to keep, of an output folder or of a run in MLflow, and fetch it as a plain diffusers folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_icr.monitoring.series import HISTORY, read_history
from mlflow_icr.monitoring.verdict import verdict
from mlflow_icr.tracking.checkpoints.folder import checkpoints, copy_pipeline
from mlflow_icr.tracking.checkpoints.model_delivery import STEP_TAG, UPLOADED, WEIGHTS_TAG
from mlflow_icr.tracking.checkpoints.model_folder import PIPELINE
from mlflow_icr.tracking.mlflow.store import StoreError, answers, artifacts_answer, connect


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, with the values of its measurement; `place` is a folder or an artifact URI, or None where it is gone."""

    images_seen: int
    values: Mapping[str, float]
    place: Path | str | None


@dataclass(frozen=True)
class Choice:
    """The checkpoint that was chosen, and why, in words."""

    checkpoint: Checkpoint
    why: str


def best_checkpoint(
    run: Path | str,
    *,
    metric: str | None = None,
    maximum: bool = False,
    output_dir: Path | str | None = None,
    tracking_uri: str | None = None,
) -> Path:
    """The diffusers folder of a run's checkpoint to keep: the verdict's, or that with the lowest value of a metric.

    `run` is an output folder, or the id of an MLflow run of `tracking_uri` (MLFLOW_TRACKING_URI). `maximum` takes the highest
    value. The folder is copied to `output_dir`, whole or not at all; without one it stays where it is, or is downloaded to a
    temporary folder. Raises ValueError for an unknown run, one without checkpoints or without the metric, and an `output_dir`
    that holds something; StoreError where MLflow does not answer.
    """
    check_output(output_dir)
    if maximum and metric is None:
        raise ValueError("maximum is True and metric None; expected a metric to take the highest value of")
    return fetch(choose(run, metric=metric, maximum=maximum, tracking_uri=tracking_uri), output_dir, tracking_uri)


def choose(run: Path | str, *, metric: str | None = None, maximum: bool = False, tracking_uri: str | None = None) -> Choice:
    """The checkpoint that `best_checkpoint` fetches, and why it is that one. Raises as it does."""
    measured, keep = _of_folder(Path(run)) if Path(run).is_dir() else _of_run(str(run), tracking_uri)
    if not any(checkpoint.place for checkpoint in measured):
        raise ValueError(f"run is {str(run)!r}, which has {_without_weights(measured)}; expected a run with checkpoints")
    return _verdicts(measured, keep, run) if metric is None else _extreme(measured, metric, maximum, run)


def _without_weights(measured: Sequence[Checkpoint]) -> str:
    return f"{len(measured)} checkpoints without their weights" if measured else "no checkpoints"


def _of_folder(folder: Path) -> tuple[list[Checkpoint], int | None]:
    """The measured checkpoints of an output folder, also those that are gone, and which one the verdict keeps."""
    if not (folder / HISTORY).exists():
        raise ValueError(f"run is {str(folder)!r}, which holds no {HISTORY}; expected the output folder of one run")
    rows = {int(row["images_seen"]): row for row in read_history(folder)}
    folders = checkpoints(folder)
    measured = [Checkpoint(step, row, folders.get(step)) for step, row in sorted(rows.items())]
    return measured, verdict(list(rows.values())).checkpoint_images_seen


def _of_run(run_id: str, tracking_uri: str | None) -> tuple[list[Checkpoint], int | None]:
    """The same for a run in MLflow."""
    from mlflow.exceptions import MlflowException

    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", run_id):
        raise ValueError(f"run is {run_id!r}; expected an output folder that is there, or the id of an MLflow run")
    client = connect(tracking_uri)
    with answers(tracking_uri):
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise ValueError(
                    f"run is {run_id!r}, which is no folder, and no run of the tracking store; expected either"
                ) from None
            raise
        measured, token = [], None
        while True:
            page = client.search_logged_models(
                [run.info.experiment_id], f"source_run_id = '{run_id}'", page_token=token, max_results=100
            )
            measured += [_of_model(model) for model in page if model.tags.get(STEP_TAG, "").isdecimal()]
            token = page.token
            if not token:
                break
    keep = run.data.tags.get("verdict.checkpoint_images_seen", "")
    return sorted(measured, key=lambda c: c.images_seen), int(keep) if keep.isdecimal() else None


def _of_model(model: Any) -> Checkpoint:
    values = {m.key: m.value for m in sorted(model.metrics or [], key=lambda m: (m.step, m.timestamp))}
    place = f"{model.artifact_location}/{PIPELINE}" if model.tags.get(WEIGHTS_TAG) == UPLOADED else None
    return Checkpoint(int(model.tags[STEP_TAG]), values, place)


def _verdicts(measured: Sequence[Checkpoint], keep: int | None, run: Path | str) -> Choice:
    if keep is None:
        raise ValueError(f"run is {str(run)!r}, which has no verdict yet; expected metric, to choose by")
    chosen = next((c for c in measured if c.images_seen == keep and c.place is not None), None)
    if chosen is None:
        available = ", ".join(str(c.images_seen) for c in measured if c.place is not None)
        gone = f"whose verdict keeps the checkpoint at {keep} images seen, which is gone"
        raise ValueError(f"run is {str(run)!r}, {gone}; there are {available}")
    return Choice(chosen, f"{keep} images seen, the checkpoint that the verdict keeps")


def _extreme(measured: Sequence[Checkpoint], metric: str, maximum: bool, run: Path | str) -> Choice:
    candidates = [c for c in measured if metric in c.values and c.values[metric] == c.values[metric]]  # without nan
    if not candidates:
        metrics = sorted({key for c in measured for key in c.values} - {"images_seen"})
        raise ValueError(f"metric is {metric!r}, which no checkpoint of {str(run)!r} has; expected one of {', '.join(metrics)}")
    kind = "highest" if maximum else "lowest"
    ordered = sorted(candidates, key=lambda c: (-c.values[metric] if maximum else c.values[metric], c.images_seen))
    available = [c for c in ordered if c.place is not None]
    if not available:
        raise ValueError(f"metric is {metric!r}, which was measured at no checkpoint of {str(run)!r} that is still there")
    best, best_ever = available[0], ordered[0]
    why = f"{best.images_seen} images seen, {metric} {best.values[metric]:.6g}, the {kind} of the checkpoints there are"
    if best.values[metric] != best_ever.values[metric]:
        why += f"; it was {best_ever.values[metric]:.6g} at {best_ever.images_seen}, whose checkpoint is gone"
    return Choice(best, why)


def check_output(output_dir: Path | str | None) -> None:
    """Raise ValueError unless `output_dir` is None, a new folder or an empty one."""
    if output_dir is None:
        return
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output is {str(output_dir)!r}, which is there already; expected a new folder, or an empty one")


def fetch(choice: Choice, output_dir: Path | str | None = None, tracking_uri: str | None = None) -> Path:
    """Copy or download a chosen checkpoint to a folder; without one, it is where it is. Raises OSError, StoreError."""
    place = choice.checkpoint.place
    assert place is not None, "only what is there is chosen"
    if output_dir is None:
        return place if isinstance(place, Path) else _download(place, None, tracking_uri)
    folder = Path(output_dir)
    part = folder.absolute().with_name(f".{folder.absolute().name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        copied = part
        if isinstance(place, Path):
            copy_pipeline(place, part)
        else:
            copied = _download(place, part, tracking_uri)
        copied.rename(folder.absolute())
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _download(uri: str, to: Path | None, tracking_uri: str | None) -> Path:
    import mlflow

    with artifacts_answer():
        folder = mlflow.artifacts.download_artifacts(
            artifact_uri=uri, dst_path=None if to is None else str(to), tracking_uri=tracking_uri
        )
    if not Path(folder).is_dir():
        raise StoreError(f"the artifact store does not have what it took: {PIPELINE} of the checkpoint is missing")
    return Path(folder)

"""Upload pictures, files and data sets of a run folder to a run in MLflow."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mlflow_icr.tracking.mlflow.failures import RefusalError
from mlflow_icr.tracking.operations import TABLE, Dataset, File, Picture


def log_dataset(client: Any, run_id: str, operation: Dataset) -> None:
    """Log a set of images as an input of the run; the store keeps one data set for each digest."""
    from mlflow.entities import Dataset as Described
    from mlflow.entities import DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    tags = [InputTag(MLFLOW_DATASET_CONTEXT, operation.context)]
    client.log_inputs(run_id, [DatasetInput(Described(**operation.description), tags)])


def log_picture(client: Any, run_id: str, folder: Path, operation: Picture, key: str, may_be_repeated: bool) -> None:
    """Log a picture with its step, once, under a key that file names allow. Raises RefusalError if the file is missing."""
    from PIL import Image

    if may_be_repeated and _is_there(client, run_id, key, operation):
        return
    with Image.open(_existing(folder / operation.path)) as image:
        image.load()
    client.log_image(run_id, image, key=key, step=operation.step, timestamp=operation.time, synchronous=True)


def _is_there(client: Any, run_id: str, key: str, operation: Picture) -> bool:
    """Whether a picture is complete, with its thumbnail; a partial upload is removed."""
    sanitised = re.escape(key.replace("/", "~"))
    pattern = re.compile(rf"images/{sanitised}\Wstep\W{operation.step}\Wtimestamp\W{operation.time}\W")
    parts = [file.path for file in client.list_artifacts(run_id, "images") if pattern.match(file.path)]
    if len(parts) >= 2:
        client.set_tag(run_id, "mlflow.loggedImages", True)
        return True
    if parts:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        repository = get_artifact_repository(client.get_run(run_id).info.artifact_uri, tracking_uri=client.tracking_uri)
        for path in parts:
            repository.delete_artifacts(path)
    return False


def log_file(client: Any, run_id: str, folder: Path, operation: File, to: str) -> None:
    """Upload a file as it is now; a table is shown on the run's page. Raises RefusalError if the file is missing."""
    client.log_artifact(run_id, str(_existing(folder / operation.path)), to or None)
    if operation.role == TABLE:  # the page shows those that a tag names, those of earlier processes too
        tag = client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]")
        paths = {mark["path"] for mark in json.loads(tag)} | {f"{to}/{Path(operation.path).name}"}
        marks = json.dumps([{"path": path, "type": "table"} for path in sorted(paths)])
        client.set_tag(run_id, "mlflow.loggedArtifacts", marks)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise RefusalError(f"{path} is not there any more")
    return path

"""Delivery: operations of the outbox, one by one, to an MLflow server; each arrives once, however often it is tried."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow_icr.tracking.mlflow.outbox import Operation, Outbox

KEY_TAG = "icr.outbox"
Point = tuple[str, float, int, int]  # key, value, step, time in ms

BATCH = 100  # parameters or tags; the store's limit
METRICS = 1000


class RefusalError(Exception):
    """The server answers, and does not want this operation; what follows may be welcome."""


class Delivery:
    """Does what operations say, with MLflow's client, to the outbox's run."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self._client: Any = None

    def send(self, operation: Operation, *, doubtful: bool) -> None:
        """Do one operation; `doubtful` when it may have arrived before, in part or as a whole.

        Raises RefusalError when the server answers that it is not valid, and what MLflow raises when it does not answer.
        """
        import mlflow
        from mlflow.exceptions import MlflowException

        # Anew each time: the address may have changed.
        self._client = mlflow.MlflowClient()
        try:
            getattr(self, f"_{operation['kind']}")(operation, doubtful)
        except MlflowException as error:
            # Without a run nothing else has a place: its start is tried until it is there.
            if operation["kind"] != "start" and error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise RefusalError(str(error).splitlines()[0][:300]) from error
            raise

    @property
    def _run_id(self) -> str:
        assert self.outbox.run_id is not None, "a run is started before anything is said about it"
        return self.outbox.run_id

    def _start(self, operation: Operation, doubtful: bool) -> None:
        if self.outbox.run_id is None:
            self._find_or_make(operation, doubtful)
        elif operation["running"]:
            self._client.update_run(self._run_id, status="RUNNING")
        self._describe(operation)

    def _find_or_make(self, operation: Operation, doubtful: bool) -> None:
        import mlflow

        if operation["run_id"] is not None:
            run = self._client.get_run(operation["run_id"])
            if operation["running"]:
                self._client.update_run(operation["run_id"], status="RUNNING")
        else:
            run = self._made_before() if doubtful else None
            # The fluent interface knows the experiment and the context's tags; in this thread nobody else's run is active.
            run = run or mlflow.start_run(run_name=operation["name"], tags={KEY_TAG: self.outbox.key})
        self.outbox.belongs_to(run.info.run_id, run.info.experiment_id)

    def _made_before(self) -> Any:
        """The run that an attempt without an answer left, if there is one."""
        experiments = [experiment.experiment_id for experiment in self._client.search_experiments()]
        found = self._client.search_runs(experiments, f"tags.`{KEY_TAG}` = '{self.outbox.key}'", max_results=1)
        return found[0] if found else None

    def _describe(self, operation: Operation) -> None:
        """Parameters that the run does not have, since one cannot be changed, and all tags."""
        from mlflow.entities import Param, RunTag

        there = self._client.get_run(self._run_id).data.params
        new = [Param(key, value[:6000]) for key, value in operation["params"].items() if key not in there]
        tags = [RunTag(key, value[:8000]) for key, value in operation["tags"].items()]
        for start in range(0, max(len(new), len(tags)), BATCH):
            batch = slice(start, start + BATCH)
            self._client.log_batch(self._run_id, params=new[batch], tags=tags[batch])

    def _tags(self, operation: Operation, doubtful: bool) -> None:
        self._describe(operation | {"params": {}})

    def _metrics(self, operation: Operation, doubtful: bool) -> None:
        step, time = operation["step"], operation["time"]
        self._log_points([(key, value, step, time) for key, value in operation["values"].items()], doubtful)

    def _points(self, operation: Operation, doubtful: bool) -> None:
        self._log_points([(key, value, step, time) for key, value, step, time in operation["points"]], doubtful)

    def _log_points(self, points: Sequence[Point], doubtful: bool) -> None:
        from mlflow.entities import Metric

        there: set[tuple[str, int, int]] = set()
        if doubtful:
            for key in {key for key, *_ in points}:
                history = self._client.get_metric_history(self._run_id, key)
                there |= {(key, point.step, point.timestamp) for point in history}
        metrics = [Metric(key, value, time, step) for key, value, step, time in points if (key, step, time) not in there]
        for start in range(0, len(metrics), METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + METRICS])

    def _picture(self, operation: Operation, doubtful: bool) -> None:
        from PIL import Image

        # The characters that MLflow allows in a picture's name are fewer than in a metric's, and it refuses before it asks.
        key, step, time = re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", operation["key"]), operation["step"], operation["time"]
        if doubtful and self._picture_is_there(key, step, time):
            return
        with Image.open(self._file(operation)) as image:
            image.load()
        self._client.log_image(self._run_id, image, key=key, step=step, timestamp=time, synchronous=True)

    def _picture_is_there(self, key: str, step: int, time: int) -> bool:
        """Whether a picture is whole, as the file and its thumbnail; what is there of half a one is taken away."""
        sanitised = re.escape(key.replace("/", "~"))
        pattern = re.compile(rf"images/{sanitised}\Wstep\W{step}\Wtimestamp\W{time}\W")
        parts = [file.path for file in self._client.list_artifacts(self._run_id, "images") if pattern.match(file.path)]
        if len(parts) >= 2:
            self._client.set_tag(self._run_id, "mlflow.loggedImages", True)
            return True
        if parts:
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            repository = get_artifact_repository(self._client.get_run(self._run_id).info.artifact_uri)
            for path in parts:
                repository.delete_artifacts(path)
        return False

    def _dataset(self, operation: Operation, doubtful: bool) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

        # The store knows a data set by its digest, and a second one as the first.
        tags = [InputTag(MLFLOW_DATASET_CONTEXT, operation["context"])]
        self._client.log_inputs(self._run_id, [DatasetInput(Dataset(**operation["description"]), tags)])

    def _table(self, operation: Operation, doubtful: bool) -> None:
        # As mlflow.log_table does it; that one would append to a table of the same name, and a resumed run has one.
        self._client.log_dict(self._run_id, operation["content"], operation["to"])
        self._client.set_tag(self._run_id, "mlflow.loggedArtifacts", operation["marks"])

    def _artifact(self, operation: Operation, doubtful: bool) -> None:
        self._client.log_artifact(self._run_id, str(self._file(operation)), operation["to"])

    def _end(self, operation: Operation, doubtful: bool) -> None:
        import mlflow

        active = mlflow.active_run()  # in this thread: the one that `_find_or_make` started, if it did
        # MLflow prints the run's address here, with the password where the tracking URI has one.
        with contextlib.redirect_stdout(io.StringIO()):
            if active is not None and active.info.run_id == self._run_id:
                mlflow.end_run(operation["status"])
                return
            self._client.set_terminated(self._run_id, operation["status"], end_time=operation["time"])

    def _file(self, operation: Operation) -> Path:
        path = self.outbox.folder / operation["path"]
        if not path.is_file():
            raise RefusalError(f"{path} is not there any more")
        return path

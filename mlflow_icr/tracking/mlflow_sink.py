"""Results in MLflow: one run per job, metrics over images seen, pictures with their step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mlflow_icr.monitoring.report import Report
from mlflow_icr.monitoring.verdict import Verdict
from mlflow_icr.tracking.logged import Logged

# MLflow's defaults make one call to a dead server block for minutes (7 retries, 120 s each); measurements must not.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


class MLflowSink:
    """Writes to the run that MLFLOW_RUN_ID or `run_id` names, to the active one, or to a new one.

    What the server does not take is kept, in order, and tried again with the next measurement and at the end. Parameters
    that the run has already (those of `mlflow run -P`) stay as they are. With `joins`, results are added to the run of
    `run_id` as it is: it is neither set running nor ended. `note` is a file that is told the run, once there is one.
    Use it on the main process only.
    """

    name = "MLflow"

    def __init__(
        self, run_id: str | None = None, run_name: str | None = None, *, joins: bool = False, note: Path | None = None
    ) -> None:
        if joins and run_id is None:
            raise ValueError("joins is True and run_id None; expected the run to join")
        self.run_id = run_id
        self.joins, self.note_file = joins, note
        self.run_name = run_name
        self.experiment_id: str | None = None
        self._owned = True
        self._tables: list[str] = []
        self._pending: list[Callable[[], None]] = []
        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)

    def open(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Find or make the run, and log what it does not have yet."""
        self._send(self._start, partial(self._describe, params, tags))

    def _start(self) -> None:
        import mlflow

        if self.joins:
            run = mlflow.MlflowClient().get_run(self.run_id)
        elif self.run_id is None and "MLFLOW_RUN_ID" not in os.environ:
            run = mlflow.active_run()
        else:
            run = None
        self._owned = run is None
        if run is None:
            adopted = self.run_id is not None or "MLFLOW_RUN_ID" in os.environ
            # An adopted run keeps the name that `mlflow run` gave it.
            run = mlflow.start_run(run_id=self.run_id, run_name=None if adopted else self.run_name)
        self._client = mlflow.MlflowClient()
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        if self.note_file is not None:
            self.note_file.write_text(json.dumps({"run_id": self.run_id, "experiment_id": self.experiment_id}))

    def _describe(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        assert self.run_id is not None
        there = self._client.get_run(self.run_id).data.params
        new = [Param(key, str(value)[:6000]) for key, value in params.items() if key not in there]
        run_tags = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, max(len(new), len(run_tags)), 100):  # the store's limit for one batch
            batch = slice(start, start + 100)
            self._client.log_batch(self.run_id, params=new[batch], tags=run_tags[batch])

    def recorded_steps(self) -> set[int]:
        """Steps of all `repr/` and `mem/` metrics that the run has."""
        if self.run_id is None or self._pending:
            return set()
        keys = [key for key in self._client.get_run(self.run_id).data.metrics if key.startswith(("repr/", "mem/"))]
        return {metric.step for key in keys for metric in self._client.get_metric_history(self.run_id, key)}

    def write(self, report: Report) -> None:
        """Log a report's values in one batch, then its pictures, the reasons for what is absent, and warnings."""
        now = time.time_ns() // 1_000_000
        calls = [partial(self._log, report.values, report.step, now)]
        calls += [partial(self._picture, key, picture, report.step, now) for key, picture in report.figures.items()]
        for kind, texts in (("absent", report.absent), ("warning", report.warnings)):
            if texts:
                calls.append(partial(self._explain, kind, texts))
        self._send(*calls)

    def _log(self, values: Mapping[str, float], step: int, timestamp: int) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(key, value, timestamp, step) for key, value in values.items()]
        for start in range(0, len(metrics), 1000):  # the store's limit for one batch
            self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def _picture(self, key: str, picture: np.ndarray, step: int, timestamp: int) -> None:
        self._client.log_image(self.run_id, picture, key=key, step=step, timestamp=timestamp, synchronous=True)

    def _explain(self, kind: str, texts: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(f"{kind}.{key}", text[:8000]) for key, text in texts.items()]
        self._client.log_batch(self.run_id, tags=tags[:100])

    def log(self, rows: Sequence[Logged]) -> None:
        """Log values of somebody else's training at their own steps and times. What fails is not kept: the file has it.

        Texts become tags, of which a run has one for each key: the last. Sent twice, a value is stored once.
        """
        from mlflow.entities import Metric, RunTag

        self._send()  # the run may have to be made yet
        metrics = [Metric(key, value, round(r.time * 1000), r.step) for r in rows for key, value in r.values.items()]
        for start in range(0, len(metrics), 1000):  # the store's limits for one batch
            self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])
        tags = [RunTag(f"logged.{key}", text[:8000]) for key, text in {k: v for r in rows for k, v in r.texts.items()}.items()]
        for start in range(0, len(tags), 100):
            self._client.log_batch(self.run_id, tags=tags[start : start + 100])

    def summary(self, values: Mapping[str, float], step: int) -> None:
        """Log the summary metrics at the last step."""
        now = time.time_ns() // 1_000_000
        self._send(lambda: self._log(values, step, now))

    def verdict(self, verdict: Verdict, step: int) -> None:
        """Set the verdict's tags, which a run table can be filtered by."""
        from mlflow.entities import RunTag

        tags = {"verdict": verdict.state, "verdict.text": verdict.text}
        tags |= {f"verdict.{key}": f"{value:.0f}" for key, value in verdict.summary().items()}
        entities = [RunTag(key, value[:8000]) for key, value in tags.items()]
        self._send(lambda: self._client.log_batch(self.run_id, tags=entities))

    def table(self, name: str, rows: Sequence[Mapping[str, object]], step: int) -> None:
        """Log `tables/<name>.json`, which the run's page shows as a table."""
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        content = {"columns": list(columns), "data": [list(row) for row in zip(*columns.values(), strict=True)]}
        path = f"tables/{name}.json"
        self._tables = sorted({*self._tables, path})
        marks = json.dumps([{"path": table, "type": "table"} for table in self._tables])
        # As mlflow.log_table does it; that one would append to a table of the same name, and a resumed run has one.
        self._send(
            lambda: self._client.log_dict(self.run_id, content, path),
            lambda: self._client.set_tag(self.run_id, "mlflow.loggedArtifacts", marks),
        )

    def embedding(self, name: str, vectors: np.ndarray, images: np.ndarray, labels: Sequence[str], step: int) -> None:
        """Nothing: MLflow has no projector."""

    def artifact(self, path: str, folder: str | None = None) -> None:
        """Upload a file into the run's artifacts."""
        self._send(lambda: self._client.log_artifact(self.run_id, path, folder))

    def note(self, markdown: str) -> None:
        """Set the description that the run's page shows."""
        self._send(lambda: self._client.set_tag(self.run_id, "mlflow.note.content", markdown))

    def close(self, status: str) -> None:
        """End the run with a status, unless it was somebody else's active run."""
        import mlflow

        try:
            self._send()
        finally:
            if self._owned and self.run_id is not None and not self._pending:
                mlflow.end_run(status)

    def _send(self, *calls: Callable[[], None]) -> None:
        """Do everything that is waiting, oldest first, then these; what fails, and what follows, waits for the next time."""
        self._pending.extend(calls)
        while self._pending:
            self._pending[0]()
            self._pending.pop(0)

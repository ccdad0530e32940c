"""Results in MLflow: one run per job, metrics over images seen, pictures with their step."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from mlflow_icr.extraction.files import write_whole
from mlflow_icr.monitoring.report import Report
from mlflow_icr.monitoring.verdict import Verdict
from mlflow_icr.tracking.checkpoints.folder import ALL, KEPT, NONE, check_log_models
from mlflow_icr.tracking.checkpoints.model_delivery import ModelDelivery
from mlflow_icr.tracking.logged import Logged
from mlflow_icr.tracking.mlflow.courier import Courier
from mlflow_icr.tracking.mlflow.delivery import Delivery
from mlflow_icr.tracking.mlflow.outbox import MODELS, Operation, Outbox
from mlflow_icr.tracking.mlflow.store import PATIENCE

logger = logging.getLogger(__name__)

# How long the end of a run waits for one checkpoint: a gigabyte at 2 MB/s.
UPLOAD_SECONDS = 600.0


def _now() -> int:
    return time.time_ns() // 1_000_000


class MLflowSink:
    """Writes to the run that MLFLOW_RUN_ID or `run_id` names, to the active one, or to a new one.

    Every call is written to the outbox of the output folder, which takes milliseconds; a thread delivers from there in order,
    and goes on trying while the server is away. What it has not taken when the process ends, `mlflow-icr sync` or a resumed run
    delivers. Parameters that the run has already (those of `mlflow run -P`) stay as they are. With `joins`, results are added
    to the run of `run_id` as it is: it is neither set running nor ended. Use it on the main process only.

    Checkpoints are models of the run: `log_models` says whose weights are uploaded, "all", "kept" (those that are kept at the
    end), or "none", and then there are no models; None for what the folder's earlier process had. Raises ValueError for others.
    """

    name = "MLflow"

    def __init__(
        self, run_id: str | None = None, run_name: str | None = None, *, joins: bool = False, log_models: str | None = None
    ) -> None:
        if joins and run_id is None:
            raise ValueError("joins is True and run_id None; expected the run to join")
        if log_models is not None:
            check_log_models(log_models)
        self.joins, self.run_name = joins, run_name
        self._given, self._log_models = run_id, log_models
        self._owned = True
        self._verdict: dict[str, str] = {}  # what was said last
        self._private = False  # whether the outbox is in a folder of nobody's, which goes when everything has arrived
        self._wake = threading.Condition()
        self._courier: Courier | None = None
        self._porter: Courier | None = None  # of checkpoints, where there are any
        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)

    @property
    def outbox(self) -> Outbox | None:
        """What MLflow is to be told, once there is a folder for it."""
        return None if self._courier is None else self._courier.box

    @property
    def models(self) -> Outbox | None:
        """The same, of checkpoints, where they are logged."""
        return None if self._porter is None else self._porter.box

    @property
    def failure(self) -> Exception | None:
        """Why the last attempt failed, if it did."""
        return next((c.failure for c in (self._courier, self._porter) if c is not None and c.failure is not None), None)

    @property
    def run_id(self) -> str | None:
        """The run, once the server has said which it is."""
        return self._given if self.outbox is None else self.outbox.run_id or self._given

    @property
    def experiment_id(self) -> str | None:
        """The run's experiment, once the server has said so."""
        return None if self.outbox is None else self.outbox.experiment_id

    def bind(self, folder: Path) -> None:
        """Keep the outbox in an output folder. Raises ValueError when another process delivers from it."""
        box = Outbox(folder)
        self._courier = Courier(box, Delivery(box), self._wake)
        if self._log_models in (None, NONE) and not (folder / MODELS).exists():
            return
        try:
            models = Outbox(folder, MODELS)
        except ValueError:
            box.close()
            raise
        if self._log_models is not None:
            models.set_policy(self._log_models)
        # What the run is told goes first: without the run there are no models, and a number is worth more than an upload.
        self._porter = Courier(
            models,
            ModelDelivery(models, box),
            self._wake,
            what="checkpoints",
            may_go=lambda: not box.waiting,
            stalled_seconds=UPLOAD_SECONDS,
        )

    def _main(self) -> Courier:
        if self._courier is None:
            self._private = True
            self.bind(Path(tempfile.mkdtemp(prefix="mlflow-icr-")))
        assert self._courier is not None
        return self._courier

    def _box(self) -> Outbox:
        return self._main().box

    def open(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Find or make the run, and log what it does not have yet."""
        import mlflow  # in this thread: an import in another one may see half of it

        run_id = self._given or os.environ.pop("MLFLOW_RUN_ID", None)  # once: a later run of this process is another one
        active = None if run_id or self._box().run_id else mlflow.active_run()
        self._owned = not self.joins and active is None
        start = {
            "kind": "start",
            "run_id": active.info.run_id if active is not None else run_id,
            "name": self.run_name,
            "running": self._owned,
            "params": {key: str(value) for key, value in params.items()},
            "tags": dict(tags),
        }
        self.say([start])

    def say(self, operations: Sequence[Operation], *, sync: bool = True) -> None:
        """Put operations into the outbox, on the disk at once or before they are sent. Raises OSError when the disk is full."""
        self._main().say(operations, sync=sync)

    def recorded(self) -> Mapping[int, Collection[str]]:
        """Keys by step of all that is in the outbox, taken by the server or not."""
        return self._box().recorded

    def _moment(self, step: int) -> int:
        """When what is said of a step was found, in ms: now, unless somebody knows better."""
        return _now()

    def write(self, report: Report) -> None:
        """Log a report's values in one batch, then its pictures, the reasons for what is absent, and warnings."""
        now = self._moment(report.step)
        operations: list[Operation] = []
        if report.values:
            operations.append({"kind": "metrics", "step": report.step, "time": now, "values": dict(report.values)})
        for key, picture in report.figures.items():
            path = self._kept(f"images/{key}/{report.step:012d}.png", picture)
            operations.append({"kind": "picture", "key": key, "step": report.step, "time": now, "path": path})
        said = {f"absent.{key}": why for key, why in report.absent.items()}
        said |= {f"warning.{key}": text for key, text in report.warnings.items()}
        if said:
            operations.append({"kind": "tags", "tags": said})
        if operations:
            self.say(operations, sync=False)  # the journal has it on the disk, and is replayed

    def _kept(self, path: str, picture: np.ndarray) -> str:
        """The path in the folder of a picture that the journal keeps there; any other is written beside the outbox."""
        from PIL import Image

        folder = self._box().folder
        if (folder / path).exists():
            with Image.open(folder / path) as kept:
                if np.array_equal(np.asarray(kept.convert("RGB")), picture):
                    return path
        # A picture of somebody else's may have the key and step of one of ours.
        path = f"mlflow/{uuid.uuid4().hex}/{Path(path).name}"
        write_whole(folder / path, lambda file: Image.fromarray(picture).save(file, format="png"))
        return path

    def dataset(self, description: Mapping[str, str], context: str) -> None:
        """Log a set of images as an input of the run; one that the run has already is not logged again."""
        self.say([{"kind": "dataset", "description": dict(description), "context": context}])

    def log(self, rows: Sequence[Logged]) -> None:
        """Log values of somebody else's training at their own steps and times; texts become tags, of which the last stays."""
        points = [[key, value, row.step, round(row.time * 1000)] for row in rows for key, value in row.values.items()]
        texts = {f"logged.{key}": text for row in rows for key, text in row.texts.items()}
        parts: list[Operation] = [{"kind": "points", "points": points}] if points else []
        self.say(parts + ([{"kind": "tags", "tags": texts}] if texts else []))

    def summary(self, values: Mapping[str, float], step: int) -> None:
        """Log the summary metrics at the last step."""
        self.say([{"kind": "metrics", "step": step, "time": self._moment(step), "values": dict(values)}])

    def verdict(self, verdict: Verdict, step: int) -> None:
        """Set the verdict's tags, which a run table can be filtered by."""
        tags = {"verdict": verdict.state, "verdict.text": verdict.text}
        tags |= {f"verdict.{key}": f"{value:.0f}" for key, value in verdict.summary().items()}
        if tags != self._verdict:
            self.say([{"kind": "tags", "tags": tags}], sync=False)  # it follows from the journal
            self._verdict = tags

    def table(self, name: str, rows: Sequence[Mapping[str, object]], step: int) -> None:
        """Log `tables/<name>.json`, which the run's page shows as a table."""
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        content = {"columns": list(columns), "data": [list(row) for row in zip(*columns.values(), strict=True)]}
        path = f"tables/{name}.json"
        tables = sorted({*self._box().tables, path})  # those of earlier processes too: the tag names them all
        marks = json.dumps([{"path": table, "type": "table"} for table in tables])
        self.say([{"kind": "table", "to": path, "content": content, "marks": marks}])

    def figure(self, name: str, picture: np.ndarray, step: int) -> None:
        """Log `figures/<name>.png`, in place of an older one."""
        self.artifact(str(self._box().folder / self._kept(f"figures/{name}.png", picture)), "figures")

    def embedding(self, name: str, vectors: np.ndarray, images: np.ndarray, labels: Sequence[str], step: int) -> None:
        """Nothing: MLflow has no projector."""

    def artifact(self, path: str, folder: str | None = None) -> None:
        """Upload a file into the run's artifacts."""
        self.say([{"kind": "artifact", "path": os.path.relpath(path, self._box().folder), "to": folder}])

    def note(self, markdown: str) -> None:
        """Set the description that the run's page shows."""
        self.say([{"kind": "tags", "tags": {"mlflow.note.content": markdown}}])

    def checkpoint(self, folder: Path, row: Mapping[str, float], found: Verdict, *, kept: bool = False) -> None:
        """Make a checkpoint a model of the run, with the values of its measurement, and upload it where that is wanted.

        What was said already is not said again.
        """
        models, step = self.models, int(row["images_seen"])
        if models is None or self._porter is None or models.policy == NONE:
            return
        weights = models.policy == ALL or (models.policy == KEPT and kept)
        if step in models.models and (models.models[step] or not weights):
            return
        # The points that the run has: the same value, step and time is one point, which then is the model's, too.
        times = self._box().recorded.get(step, {})
        said = {
            "kind": "model",
            "step": step,
            "path": os.path.relpath(folder, self._box().folder),
            "points": [[key, value, step, times[key]] for key, value in row.items() if key in times],
            "weights": weights,
            "turning": None if found.turned_at is None else found.checkpoint_images_seen,
        }
        self._porter.say([said])

    def close(self, status: str) -> None:
        """End the run with a status, unless it was somebody else's, and wait for the server as long as it takes things."""
        if self._owned and self._box().running:
            self.say([{"kind": "end", "status": status, "time": _now()}])
        self.finish()

    def finish(self) -> bool:
        """Deliver what waits, as far as that can be done now, and stop; returns whether everything has arrived."""
        couriers = [courier for courier in (self._main(), self._porter) if courier is not None]
        complete = all([courier.finish() for courier in couriers])
        waiting, folder = sum(len(courier.box.waiting) for courier in couriers), self._box().folder
        if waiting:
            logger.warning(
                "MLflow has not taken everything: %d operations wait in %s; mlflow-icr sync %s delivers them",
                waiting, folder, folder,
            )  # fmt: skip
        for courier in couriers:
            courier.box.close()
        if complete and self._private:
            shutil.rmtree(folder, ignore_errors=True)
        return complete

    def flush(self, patience: int = 1) -> bool:
        """Wait until everything is delivered (True), or `patience` attempts that began after this call have failed (False)."""
        complete = self._main().flush(patience)
        return complete if self._porter is None else self._porter.flush(patience) and complete

    def start_over(self) -> None:
        """Forget the run and what it has: everything waits again, for a new run."""
        self._box().start_over()
        if self.models is not None:
            self.models.start_over()

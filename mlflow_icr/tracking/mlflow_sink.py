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
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mlflow_icr.extraction.files import write_whole
from mlflow_icr.monitoring.report import Report
from mlflow_icr.monitoring.verdict import Verdict
from mlflow_icr.tracking.delivery import Delivery, RefusalError
from mlflow_icr.tracking.logged import Logged
from mlflow_icr.tracking.outbox import Operation, Outbox
from mlflow_icr.tracking.store import PATIENCE, without_credentials

logger = logging.getLogger(__name__)

PAUSES = (1.0, 2.0, 5.0, 15.0, 30.0)  # seconds from one attempt to the next, as long as the server does not answer
LAST_ATTEMPTS = 3  # at the end of a run, before what waits is left to the next process
STALLED_SECONDS = 90.0  # without any progress, after which the end of a run is not waited for


def _now() -> int:
    return time.time_ns() // 1_000_000


class MLflowSink:
    """Writes to the run that MLFLOW_RUN_ID or `run_id` names, to the active one, or to a new one.

    Every call is written to the outbox of the output folder, which takes milliseconds; a thread delivers from there in order,
    and goes on trying while the server is away. What it has not taken when the process ends, `mlflow-icr sync` or a resumed run
    delivers. Parameters that the run has already (those of `mlflow run -P`) stay as they are. With `joins`, results are added
    to the run of `run_id` as it is: it is neither set running nor ended. Use it on the main process only.
    """

    name = "MLflow"

    def __init__(self, run_id: str | None = None, run_name: str | None = None, *, joins: bool = False) -> None:
        if joins and run_id is None:
            raise ValueError("joins is True and run_id None; expected the run to join")
        self.joins, self.run_name = joins, run_name
        self._given = run_id
        self._owned = True
        self.outbox: Outbox | None = None
        self.failure: Exception | None = None  # of the last attempt
        self._told = False
        self._private = False  # whether the outbox is in a folder of nobody's, which goes when everything has arrived
        self._wake = threading.Condition()
        self._closing = False
        self._hurry = False  # somebody waits: the pause before the next attempt is over
        # How many attempts there were, at which one somebody began to wait, and how many have failed since.
        self._attempts = self._mark = self._failed = 0
        self._thread: threading.Thread | None = None
        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)

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
        self.outbox = Outbox(folder)

    def _box(self) -> Outbox:
        if self.outbox is None:
            self._private = True
            self.bind(Path(tempfile.mkdtemp(prefix="mlflow-icr-")))
        assert self.outbox is not None
        return self.outbox

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

    def deliver(self) -> None:
        """Start delivering, if that has not begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mlflow-icr delivery", daemon=True)
            self._thread.start()

    def say(self, operations: Sequence[Operation]) -> None:
        """Put operations into the outbox. Raises OSError when the disk does not take them."""
        with self._wake:
            self._box().append(operations)
            self._wake.notify_all()
        self.deliver()

    def recorded(self) -> Mapping[int, set[str]]:
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
            self.say(operations)

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
        self.say([{"kind": "tags", "tags": tags | {f"verdict.{key}": f"{v:.0f}" for key, v in verdict.summary().items()}}])

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

    def close(self, status: str) -> None:
        """End the run with a status, unless it was somebody else's, and wait for the server as long as it takes things."""
        if self._owned and self._box().running:
            self.say([{"kind": "end", "status": status, "time": _now()}])
        self.finish()

    def finish(self) -> bool:
        """Deliver what waits, as far as that can be done now, and stop; returns whether everything has arrived."""
        box = self._box()
        with self._wake:
            self._closing = True
        complete = self.flush(LAST_ATTEMPTS)
        if box.waiting:
            logger.warning(
                "MLflow has not taken everything: %d operations wait in %s; mlflow-icr sync %s delivers them",
                len(box.waiting), box.folder, box.folder,
            )  # fmt: skip
        box.close()
        if complete and self._private:
            shutil.rmtree(box.folder, ignore_errors=True)
        return complete

    def flush(self, patience: int = 1) -> bool:
        """Wait until everything is delivered (True), or `patience` attempts that began after this call have failed (False)."""
        box = self._box()
        with self._wake:
            self._mark, self._failed = self._attempts, 0
            self._hurry = True
            self._wake.notify_all()
        self.deliver()
        left, since = len(box.waiting), time.monotonic()
        while box.waiting and self._failed < patience and time.monotonic() - since < STALLED_SECONDS:
            with self._wake:
                self._wake.wait(0.1)
            if len(box.waiting) < left:
                left, since = len(box.waiting), time.monotonic()
        return not box.waiting and not box.refused

    def _work(self) -> None:
        """Deliver what waits, in a thread of its own, until told to stop."""
        box = self._box()
        delivery = Delivery(box)
        doubtful = True  # an earlier process may have tried
        failures = 0  # in a row
        while True:
            with self._wake:
                self._wake.wait_for(lambda: bool(box.waiting) or self._closing)
                if not box.waiting:
                    return
                operation = box.waiting[0][1]
                self._attempts += 1
                self._hurry = False
            try:
                refusal = self._attempt(delivery, operation, doubtful)
                with self._wake:
                    box.acknowledge(refusal)
                    self._wake.notify_all()
                self.failure, doubtful, failures = None, False, 0
            except Exception as error:  # whatever it is, it must not end a training
                self.failure, doubtful = error, True
                self._tell(error)
                with self._wake:
                    self._failed += self._attempts > self._mark
                    self._wake.notify_all()
                    if self._closing and self._failed >= LAST_ATTEMPTS:
                        return
                    self._wake.wait_for(lambda: self._hurry, PAUSES[min(failures, len(PAUSES) - 1)])
                failures += 1

    @staticmethod
    def _attempt(delivery: Delivery, operation: Operation, doubtful: bool) -> str:
        """Send one operation; returns why the server does not want it, or nothing."""
        try:
            delivery.send(operation, doubtful=doubtful)
        except RefusalError as error:
            why = without_credentials(str(error))
            logger.warning("MLflow does not want %s (%s)", operation["kind"], why)
            return why
        return ""

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            # The type only: a tracking URI, which may hold a password, can be part of the message.
            logger.warning(
                "%s does not take results (%s); training goes on, and everything measured is in %s",
                self.name, type(error).__name__, self._box().folder,
            )  # fmt: skip
        logger.debug("MLflow failed", exc_info=error)

"""The outbox: what MLflow is to be told, in order, on disk before anybody tries, and how much of it the server has taken.

`mlflow.jsonl` in an output folder has one operation a line and only grows; `mlflow.json` says which run they belong to, how
many were acknowledged, and which the server refused. Whoever delivers holds the lock of the first. Checkpoints have an outbox
of their own beside it, `models.jsonl` and `models.json`: an upload may take minutes, and no metric waits for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow_icr.extraction.files import append_line, sync_folder, write_whole

OPERATIONS = "mlflow.jsonl"
MODELS = "models.jsonl"
STATE = "mlflow.json"  # of the first
Operation = dict[str, Any]


def ended_as(folder: Path | str) -> str | None:
    """FINISHED, FAILED or KILLED, as the run of an output folder ended; None where none was started, or one goes on.

    It takes no lock, and so also answers while the run is being written. Raises ValueError naming a line that is damaged.
    """
    path, status = Path(folder) / OPERATIONS, None
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            operation = json.loads(line)
            if operation["kind"] in ("start", "end"):
                status = operation.get("status")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not an operation ({error})") from None
    return status


class Outbox:
    """The operations in a file of an output folder; those that wait are in `waiting`, as (place in the file, operation).

    Raises ValueError when another process delivers from this folder, or a line that was finished is no operation.
    """

    def __init__(self, folder: Path | str, name: str = OPERATIONS) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / name
        self._state_path = self.path.with_suffix(".json")
        self._lock = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ValueError(f"{str(self.folder)!r} is of a run that another process is writing just now") from None
        self._state: dict[str, Any] = {"run_id": None, "experiment_id": None, "acknowledged": 0, "refused": {}}
        self._state["key"] = uuid.uuid4().hex  # which makes operations that were tried before known again
        if self._state_path.exists():
            self._state |= json.loads(self._state_path.read_text())
        self.waiting: deque[tuple[int, Operation]] = deque()
        self.recorded: dict[int, dict[str, int]] = {}  # time in ms by step and key
        self.models: dict[int, bool] = {}  # checkpoints by step, and whether their weights were to be uploaded
        self.turning: int | None = None  # the one to keep
        self.tables: set[str] = set()  # paths among the artifacts
        self.running = False  # whether the run was started and not ended, by what was appended
        self.count = 0
        self._unsynced = False
        self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # never promised to anybody
            os.truncate(self.path, whole)
        refused = self._state["refused"]
        for number, line in enumerate(content[:whole].split(b"\n")[:-1]):
            try:
                operation = json.loads(line)
                self._note(operation)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number + 1}: not an operation ({error})") from None
            if number >= self._state["acknowledged"] or str(number) in refused:
                self.waiting.append((number, operation))
            self.count += 1

    def _note(self, operation: Operation) -> None:
        kind = operation["kind"]
        if kind == "metrics":
            self.recorded.setdefault(operation["step"], {}).update(dict.fromkeys(operation["values"], operation["time"]))
        elif kind == "picture":
            self.recorded.setdefault(operation["step"], {})[operation["key"]] = operation["time"]
        elif kind == "model":
            self.models[operation["step"]] = operation["weights"]
            self.turning = operation["turning"]
        elif kind == "table":
            self.tables.add(operation["to"])
        elif kind == "start":
            self.running = operation["running"]
        elif kind == "end":
            self.running = False

    @property
    def run_id(self) -> str | None:
        """The MLflow run that the operations go to, once it is known."""
        return self._state["run_id"]

    @property
    def experiment_id(self) -> str | None:
        """The experiment of that run."""
        return self._state["experiment_id"]

    @property
    def key(self) -> str:
        """Which outbox this is."""
        return str(self._state["key"])

    @property
    def policy(self) -> str:
        """Whose weights are uploaded: all, kept or none; of an outbox of checkpoints."""
        return str(self._state.get("log_models", "none"))

    def set_policy(self, policy: str) -> None:
        """Remember whose weights are uploaded, for whoever delivers later."""
        if self._state.get("log_models") != policy:
            self._state["log_models"] = policy
            self._write()

    @property
    def refused(self) -> Mapping[str, str]:
        """Reasons by the place of what the server does not want; it is offered again when the folder is opened again."""
        return dict(self._state["refused"])

    def append(self, operations: Sequence[Operation], *, sync: bool = True) -> None:
        """Add operations, all or none; with `sync` a power cut cannot take them once this returns. Raises OSError."""
        append_line(self.path, "".join(json.dumps(operation) + "\n" for operation in operations), sync=sync)
        self._unsynced = self._unsynced or not sync
        for operation in operations:
            self._note(operation)
            self.waiting.append((self.count, operation))
            self.count += 1

    def sync(self) -> None:
        """Put on the disk what was added without: before it is sent, or a power cut would have it said a second time."""
        if self._unsynced:
            self._unsynced = False  # before: what is added meanwhile may not be on the disk
            try:
                sync_folder(self.path)
            except OSError:
                self._unsynced = True
                raise

    def belongs_to(self, run_id: str | None, experiment_id: str | None) -> None:
        """Remember the run; None for a run that is still to be made."""
        self._state |= {"run_id": run_id, "experiment_id": experiment_id}
        self._write()

    def acknowledge(self, refusal: str = "") -> None:
        """The first of what waits was taken, or refused for a reason."""
        place, _ = self.waiting[0]
        self._state["acknowledged"] = max(self._state["acknowledged"], place + 1)
        self._state["refused"].pop(str(place), None)
        if refusal:
            self._state["refused"][str(place)] = refusal
        self._write()
        self.waiting.popleft()

    def start_over(self) -> None:
        """Forget the run and what it has: everything waits again, for a new run."""
        self._state |= {"run_id": None, "experiment_id": None, "acknowledged": 0, "refused": {}, "key": uuid.uuid4().hex}
        self._write()
        self.waiting.clear()
        self.recorded.clear()
        self.models.clear()
        self.count = 0
        self._read()

    def _write(self) -> None:
        write_whole(self._state_path, lambda file: file.write(json.dumps(self._state).encode()))

    def close(self) -> None:
        """Let others deliver."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

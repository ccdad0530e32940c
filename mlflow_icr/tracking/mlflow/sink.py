"""Results in MLflow: one run per job, metrics over images seen, pictures with their step."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow_icr.environment import ours
from mlflow_icr.tracking import operations as ops
from mlflow_icr.tracking.checkpoints.folder import ALL, KEPT, NONE, check_log_models, check_register
from mlflow_icr.tracking.checkpoints.model_delivery import ModelDelivery
from mlflow_icr.tracking.event_log import EventLog
from mlflow_icr.tracking.keys import (
    LONGEST_KEY,
    LONGEST_PARAM,
    LONGEST_TAG,
    METRICS_PER_CALL,
    NOT_FILE,
    NOT_MLFLOW,
    TEXTS_PER_CALL,
    clean_key,
)  # fmt: skip
from mlflow_icr.tracking.mlflow.active import activate, deactivate, users_run
from mlflow_icr.tracking.mlflow.artifacts import log_dataset, log_file, log_picture
from mlflow_icr.tracking.mlflow.failures import failure_of, reason_of
from mlflow_icr.tracking.mlflow.store import end_run, float64_bits, is_answering
from mlflow_icr.tracking.mlflow.target import Target, absolute_uri, public_uri, resolve, run_address, with_credentials
from mlflow_icr.tracking.operations import FILES, MODELS, POINTS
from mlflow_icr.tracking.sink import Failure, Sink, SinkState

STATE_FILE = "mlflow.json"
KEY_TAG = "icr.log"  # of a run: which folder's log it shows
NAME_TAG = "icr.key."  # and the original of a key that MLflow does not accept
OPEN_SECONDS = 1.0  # that opening waits for the run of a server
LOCAL_OPEN_SECONDS = 30.0  # and of a database on this machine, whose tables may have to be made


class MLflowSink(Sink):
    """Writes to the run that MLFLOW_RUN_ID or `run_id` names, to the active one, or to a new one.

    Server, experiment and run are determined when a tracker opens, and kept in the folder; results go nowhere else. Arguments
    come before `mlflow.set_tracking_uri` and `set_experiment`, and those before the environment. The run becomes the active one
    of the thread that opened it, if its server is MLflow's own of this process. Parameters that it has already (those of
    `mlflow run -P`) stay. With `joins`, results are added to the run of `run_id`: it is neither set running nor ended, and
    values that it has already (`known` keys by step) are not sent again.

    Checkpoints are models of the run. `log_models` selects those whose weights are uploaded: "all", "kept" (at the end of the
    run) or "none", which makes no models; None continues the folder's earlier choice. `register` names a registered model; its
    alias `keep` is set to the checkpoint to keep when the run ends. Raises ValueError for other values and impossible names.

    For a resumed folder, `tracking_uri` is the server's present address; with `starts_over` everything goes to a new run.
    """

    name = "MLflow"
    remote = True
    state_file = STATE_FILE
    lanes = (POINTS, FILES, MODELS)
    pace = 3.0  # a round of calls costs a server some 25 ms: this often, it is less than a hundredth of the training

    def __init__(
        self,
        *,
        tracking_uri: str | None = None,
        experiment: str | None = None,
        run_name: str | None = None,
        parent_run_id: str | None = None,
        run_id: str | None = None,
        joins: bool = False,
        known: Mapping[int, set[str]] | None = None,
        log_models: str | None = None,
        register: str | None = None,
        starts_over: bool = False,
    ) -> None:
        if joins and run_id is None:
            raise ValueError("joins is True and run_id None; expected the run to join")
        if log_models is not None:
            check_log_models(log_models)
        if register is not None:
            check_register(register, log_models)
        self.tracking_uri, self.experiment, self.run_name = tracking_uri, experiment, run_name
        self.parent_run_id, self.joins, self.known = parent_run_id, joins, known or {}
        self._given, self._starts_over = run_id, starts_over
        # What the folder keeps for later processes, `mlflow-icr sync` among them.
        self._wishes = {key: wish for key, wish in (("log_models", log_models), ("register", register)) if wish is not None}
        self._client: Any = None
        self._run: Any = None  # as it was when it was found or made
        self._making, self._asking = threading.Lock(), threading.Lock()  # lanes have one run, and ask once
        self._found = threading.Event()
        self._wants_running = False
        self._activates = False
        self._reached: tuple[float, bool] = (-60.0, False)  # when the server was last asked, and whether it answered

    # What is known of the run

    @property
    def run_id(self) -> str | None:
        """The run, once the server has said which it is."""
        state = getattr(self, "state", None)
        return self._given if state is None else state.content.get("run_id") or self._given

    @property
    def experiment_id(self) -> str | None:
        """The id of the run's experiment, once it is known."""
        state = getattr(self, "state", None)
        return None if state is None else state.content.get("experiment_id")

    @property
    def target(self) -> Target:
        """The server, experiment and run of the results."""
        return Target.of(self.state.content["target"])

    @property
    def address(self) -> str | None:
        """The address of the run's page, once there is a run."""
        run_id, experiment_id = self.run_id, self.experiment_id
        return run_address(self.target.uri, experiment_id, run_id) if run_id and experiment_id else None

    @property
    def delivered_by(self) -> str:
        """The command that delivers what waits."""
        return f"mlflow-icr sync {self.folder}"

    @property
    def policy(self) -> str:
        """Which checkpoints' weights are uploaded."""
        return str(self.state.content.get("log_models", NONE))

    # Opening and closing

    def state_path(self, folder: Path) -> Path:
        """`mlflow.json`: target, run, and how far each lane is."""
        return folder / self.state_file

    def attach(self, folder: Path, log: EventLog, state: SinkState, echo: Callable[[str], None]) -> None:
        """Attach to the folder, and keep there how models are logged."""
        super().attach(folder, log, state, echo)
        self._client = self._run = None
        if not self._wishes.items() <= state.content.items():
            state.update(**self._wishes)

    def open(self, opening: bool, *, offline: bool = False) -> None:
        """Determine server, experiment and run, unless the folder has them."""
        import mlflow  # in this thread: an import in another one may see half of it

        self._wants_running = opening and not self.joins
        content = self.state.content
        if self._starts_over:
            name = self.run_name or content.get("target", {}).get("run_name")
            target = resolve(
                tracking_uri=self.tracking_uri, experiment=self.experiment, run_name=name, parent_run_id=None, run_id=None
            )
            fresh: dict[str, Any] = {"key": uuid.uuid4().hex, "run_id": None, "experiment_id": None}
            fresh |= {"cursors": {}, "refused": {}, "keys": {}}
            self.state.update(target=target.as_dict(), **fresh)
        elif "target" in content and self.tracking_uri is not None:
            self.redirect(self.tracking_uri)
        if "target" not in content:
            active = None if self._given or content.get("run_id") or self.tracking_uri else users_run()
            given = active.info.run_id if active is not None else self._given
            target = resolve(
                tracking_uri=self.tracking_uri, experiment=self.experiment, run_name=self.run_name,
                parent_run_id=self.parent_run_id, run_id=given, owned=active is None and not self.joins,
            )  # fmt: skip
            self.state.update(target=target.as_dict(), **({} if "key" in content else {"key": uuid.uuid4().hex}))
        self._wants_running = self._wants_running and self.target.owned
        here = absolute_uri(mlflow.get_tracking_uri())
        self._activates = self._wants_running and not offline and self.target.uri == public_uri(here)

    def opened(self) -> None:
        """Wait briefly for the run, and make it the active one of this thread."""
        local = not self.target.uri.startswith(("http://", "https://"))
        deadline = time.monotonic() + (LOCAL_OPEN_SECONDS if local else OPEN_SECONDS)
        while time.monotonic() < deadline and self.failure is None and not self._found.wait(0.01):
            pass
        self.in_caller()

    def in_caller(self) -> None:
        """Make the run the active one, if it is known by now."""
        if self._activates and self._run is not None:
            self._activates = False
            activate(self._run)

    def redirect(self, tracking_uri: str) -> None:
        """Deliver to another address: the server has moved, or another one is wanted. The run keeps its id if it is known."""
        self.tracking_uri = tracking_uri
        self.state.update(target=replace(self.target, uri=public_uri(absolute_uri(tracking_uri))).as_dict())
        self._client, self._reached = None, (-60.0, False)

    def close(self) -> None:
        """Release the run, also as the active one of its thread."""
        if self.run_id is not None:
            deactivate(self.run_id)

    # Delivery, in the workers' threads

    def batch_of(self, lane: str) -> int:
        """Points by the thousand; files one by one."""
        return METRICS_PER_CALL if lane == POINTS else 1

    def patience_of(self, lane: str) -> float:
        """Long enough for a gigabyte at 2 MB/s."""
        return 90.0 if lane == POINTS else 600.0

    def reachable(self) -> bool:
        """Whether the server answers within 3 s; asked at most once a second."""
        with self._asking:
            looked, answered = self._reached
            if time.monotonic() - looked > 1.0:
                answered = is_answering(self._uri)
                self._reached = (time.monotonic(), answered)
        return answered

    def look_again(self) -> None:
        """Forget the last answer: the server may have come back since."""
        self._reached = (-60.0, False)

    def failure_of(self, error: Exception) -> Failure:
        """The meaning of an exception; before there is a run, no operation is refused."""
        return Failure.OUTAGE if self._run is None else failure_of(error)

    def reason_of(self, error: Exception) -> str:
        """An exception in a line, without credentials."""
        return reason_of(error)

    def send(self, lane: str, operations: Sequence[ops.Operation], may_be_repeated: bool) -> None:
        """Send operations to the run; consecutive values and texts go in as few calls as MLflow allows."""
        self._ensure_run(may_be_repeated)
        metrics: list[ops.Metrics] = []
        tags: dict[str, str] = {}
        for operation in operations:
            match operation:
                case ops.Metrics():
                    metrics.append(operation)
                    tags |= {f"logged.{key}": text for key, text in operation.texts.items()}
                case ops.Tags(values=values):
                    tags |= values
                case ops.Params(values=values):
                    self._log_params(values)
                case ops.Dataset():
                    log_dataset(self._client, self._id, operation)
                case ops.Picture(key=key, step=step) if not self.known.get(step):
                    log_picture(self._client, self._id, self.folder, operation, self._key(key, NOT_FILE), may_be_repeated)
                case ops.File(folder=folder) if folder is not None:
                    log_file(self._client, self._id, self.folder, operation, folder)
                case ops.Model() if self.policy != NONE:
                    self._log_model(operation)
                case _:
                    pass
        self._log_metrics(metrics, may_be_repeated)
        self._log_tags(tags)
        for operation in operations:  # sent last; MLflow accepts values of ended runs too
            if isinstance(operation, ops.End) and self.target.owned and self.log.status is not None:  # else it goes on again
                end_run(self._client, self._id, operation.status, operation.time)

    @property
    def _uri(self) -> str:
        import mlflow

        return with_credentials(self.target.uri, self.tracking_uri, mlflow.get_tracking_uri())

    def _connect(self) -> Any:
        import mlflow

        if self._client is None:
            uri = self._uri
            elsewhere = self.target.uri != public_uri(absolute_uri(mlflow.get_tracking_uri()))
            self._client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri if elsewhere else None)
        return self._client

    @property
    def _id(self) -> str:
        assert self.run_id is not None, "a run is found before anything is said of it"
        return self.run_id

    def _ensure_run(self, may_be_repeated: bool) -> None:
        with self._making:
            client = self._connect()
            if self._run is not None:
                return
            run_id = self.state.content.get("run_id")
            run = client.get_run(run_id) if run_id else self._find_or_make(client, may_be_repeated)
            if self._wants_running and run.info.status != "RUNNING":
                client.update_run(run.info.run_id, status="RUNNING")
            self.state.update(run_id=run.info.run_id, experiment_id=run.info.experiment_id)
            self._run = run
            if self._wants_running:
                self.echo(f"MLflow: {self.address}")
            self._found.set()

    def _find_or_make(self, client: Any, may_be_repeated: bool) -> Any:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking.context.registry import resolve_tags

        target = self.target
        if target.given:
            try:
                return client.get_run(target.given)
            except MlflowException as error:
                if not target.inherited or error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
            self.echo(f"MLflow: MLFLOW_RUN_ID is {target.given!r}, which the server does not have; a new run is made")
        key = self.state.content["key"]
        if may_be_repeated:  # an attempt without an answer may have made one
            experiments = [experiment.experiment_id for experiment in client.search_experiments()]
            found = client.search_runs(experiments, f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
            if found:
                return found[0]
        tags = {KEY_TAG: key}
        if target.parent_run_id:
            tags["mlflow.parentRunId"] = target.parent_run_id
        with ours():
            tags = resolve_tags(tags)
        return client.create_run(self._experiment(client), tags=tags, run_name=target.run_name or None)

    def _experiment(self, client: Any) -> str:
        target = self.target
        if target.experiment:
            experiment = client.get_experiment_by_name(target.experiment)
            return str(client.create_experiment(target.experiment) if experiment is None else experiment.experiment_id)
        return target.experiment_id or "0"

    def _key(self, key: str, wrong: re.Pattern[str] = NOT_MLFLOW) -> str:
        """The key that MLflow accepts for this one; the original is kept here and in a tag of the run."""
        clean = clean_key(key, wrong)
        names: dict[str, str] = self.state.content.get("keys", {})
        if clean == key and clean not in names:
            return clean
        count, free = 1, clean
        while names.get(free, key) != key:  # another key has become this one
            count += 1
            free = f"{clean}_{count}"
        if free not in names:
            self.state.update(keys={**names, free: key})
            self._log_tags({(NAME_TAG + free)[:LONGEST_KEY]: key})
        return free

    def _cut(self, what: str, text: str, longest: int) -> str:
        if len(text) > longest and what not in self.warned:
            self.warned.add(what)
            self.echo(f"MLflow: {what} has {len(text)} characters, of which it keeps {longest}; all are in {self.log.path}")
        return text[:longest]

    def _log_params(self, values: Mapping[str, Any]) -> None:
        """Parameters that the run does not have, since one cannot be changed."""
        from mlflow.entities import Param

        logged = self._client.get_run(self._id).data.params if values else {}
        texts = {self._key(key): self._cut(f"parameter {key!r}", str(value), LONGEST_PARAM) for key, value in values.items()}
        new = [Param(key, text) for key, text in texts.items() if key not in logged]
        for start in range(0, len(new), TEXTS_PER_CALL):
            self._client.log_batch(self._id, params=new[start : start + TEXTS_PER_CALL])

    def _log_tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(self._key(key), self._cut(f"tag {key!r}", text, LONGEST_TAG)) for key, text in values.items()]
        for start in range(0, len(tags), TEXTS_PER_CALL):
            self._client.log_batch(self._id, tags=tags[start : start + TEXTS_PER_CALL])

    def _log_metrics(self, parts: Sequence[ops.Metrics], may_be_repeated: bool) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(self._key(key), value, part.time, part.step)
            for part in parts
            for key, value in part.values.items()
            if key not in self.known.get(part.step, ())
        ]
        if may_be_repeated and points:
            keys = {point.key for point in points}
            stored = _named([point for key in keys for point in self._client.get_metric_history(self._id, key)])
            points = [point for name, point in _named(points).items() if name not in stored]
        for start in range(0, len(points), METRICS_PER_CALL):
            self._client.log_batch(self._id, metrics=points[start : start + METRICS_PER_CALL])

    def _log_model(self, operation: ops.Model) -> None:
        assert self.experiment_id is not None, "it is known with the run"
        weights = self.policy == ALL or (self.policy == KEPT and operation.kept)
        delivery = ModelDelivery(self._client, self._id, self.experiment_id, self.folder)
        newest, turning = max(self.log.models, default=operation.step), self.log.turning
        params = {self._key(key): str(value)[:LONGEST_PARAM] for key, value in self.log.params.items()}
        delivery.send(operation, params, weights=weights, newest=newest, turning=turning)
        register = self.state.content.get("register")
        if register and operation.kept and operation.step == (newest if turning is None else turning):
            delivery.register(operation.step, register)


def _named(points: Sequence[Any]) -> dict[tuple[str, int, int, int], Any]:
    """Points by the fields that identify them in MLflow's databases."""
    bits = float64_bits([point.value for point in points])
    return {(point.key, point.step, point.timestamp, int(value)): point for point, value in zip(points, bits, strict=True)}

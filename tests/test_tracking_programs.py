"""Random programs of tracker calls: whatever happens, journal, MLflow and TensorBoard agree, or `sync` names what does not."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlflow_icr import Report
from mlflow_icr.tracking import Logged, MLflowSink, TensorBoardSink, Tracker, read_history, read_logged
from mlflow_icr.tracking.keys import NOT_MLFLOW, clean_key
from mlflow_icr.tracking.mlflow.sync import sync
from tests.stores import empty_store
from tests.test_restarts import in_both_readers
from tests.test_tracking import as_float32

KEYS = ["repr/icr", "loss", "a=b", "größe", "../up", "x" * 260, "", "p q:r"]
VALUES = st.floats(-1e6, 1e6, width=32)
CALLS = st.one_of(
    st.tuples(st.just("record"), VALUES),
    st.tuples(st.just("log"), st.dictionaries(st.sampled_from(KEYS[1:]), VALUES, min_size=1, max_size=3)),
    st.tuples(st.just("table"), VALUES),
    st.tuples(st.sampled_from(["crash", "lost", "fork", "move", "close", "sync"]), st.just(None)),
)


@dataclass
class World:
    """A folder, its server, which may move, and what the program counts."""

    folder: Path
    store: Path
    step: int = 0
    tracker: Tracker | None = None
    moves: int = 0

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.store}"

    def opened(self) -> Tracker:
        if self.tracker is None:
            sinks = [MLflowSink(tracking_uri=self.uri), TensorBoardSink(self.folder / "tensorboard")]
            self.tracker = Tracker(self.folder, sinks, resume="allow")
            self.tracker.echo = lambda text: None
            self.tracker.open({"optimizer[0].lr": 0.1}, {"study": "s"})
        return self.tracker

    def gone(self) -> None:
        if self.tracker is not None:
            self.tracker.abandon()
        self.tracker = None

    def play(self, call: str, value: Any) -> None:
        self.step += 1
        if call == "record":
            self.opened().record(Report(self.step, {"repr/icr": value}))
        elif call == "log":
            self.opened().log(Logged(self.step, 1e9 + self.step, value))
        elif call == "table":
            self.opened().table("t", [{"a": value}], self.step)
        elif call == "lost":  # a kill between the journal's row and the log
            self.opened().journal.append(Report(self.step, {"repr/icr": 0.5}))
            self.gone()
        elif call == "fork":
            self._fork()
        elif call == "move":
            self.gone()
            self.moves += 1
            self.store = self.store.rename(self.store.with_name(f"moved{self.moves}.db"))
        elif call == "close":
            self.opened().close("FINISHED")
            self.tracker = None
        elif call == "sync":
            self.gone()
            if (self.folder / "mlflow.json").exists():
                sync(self.folder, tracking_uri=self.uri)
        else:
            self.gone()

    def _fork(self) -> None:
        tracker = self.opened()
        child = os.fork()
        if child == 0:
            try:
                tracker.record(Report(10**6, {"repr/icr": 9.0}))
                tracker.close("FAILED")
            finally:
                os._exit(0)
        os.waitpid(child, 0)


@pytest.fixture(scope="module")
def empty() -> Path:
    return empty_store()


@settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(program=st.lists(CALLS, min_size=1, max_size=7))
def test_random_programs_leave_three_places_that_agree(empty: Path, program: list[tuple[str, Any]]) -> None:
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as temporary:
        world = World(Path(temporary) / "run", Path(temporary) / "mlflow.db")
        shutil.copy(empty, world.store)
        for call, value in program:
            world.play(call, value)
        world.opened().close("FINISHED")
        (done,) = sync(world.folder, tracking_uri=world.uri)
        state = json.loads((world.folder / "mlflow.json").read_text())
        assert done.complete, done.text
        client = MlflowClient(world.uri)
        run = client.get_run(state["run_id"])
        assert len(client.search_runs(["0"])) == 1
        assert run.info.status == "FINISHED"

        names = {original: clean for clean, original in state.get("keys", {}).items()}
        told: dict[str, list[tuple[int, float]]] = {}
        for row in read_history(world.folder) if (world.folder / "history.jsonl").exists() else []:
            told.setdefault("repr/icr", []).append((int(row["images_seen"]), row["repr/icr"]))
        for logged in read_logged(world.folder):
            for key, value in logged.values.items():
                told.setdefault(key, []).append((logged.step, value))
        stored = {
            key: sorted((p.step, p.value) for p in client.get_metric_history(state["run_id"], key)) for key in run.data.metrics
        }
        for key, points in told.items():
            clean = names.get(key, key)
            assert clean == clean_key(key, NOT_MLFLOW) or clean.startswith(clean_key(key, NOT_MLFLOW))
            assert stored[clean] == sorted(points), key
            assert clean == key or run.data.tags[f"icr.key.{clean}"[:250]] == key
        shown = in_both_readers(world.folder / "tensorboard")
        for key, points in as_float32(told).items():
            assert shown[key] == sorted(points), key
        assert 10**6 not in [step for points in stored.values() for step, _ in points]

"""Ways in which tracking did not keep its promises, each of which was seen; and that it does now."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlflow_icr import Report
from mlflow_icr.cli import main
from mlflow_icr.tracking import Logged, MLflowSink, TensorBoardSink, Tracker
from mlflow_icr.tracking.mlflow.target import absolute_uri, public_uri
from tests.servers import free_port
from tests.stores import new_store
from tests.test_tracking import journal_scalars, mlflow_scalars, report, tensorboard_scalars

pytestmark = pytest.mark.usefixtures("own_store", "_quick")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow_icr.tracking.worker.PAUSES", (0.01,))


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "mlflow.json").read_text())
    return found


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, env=variables)


# 1: what sync says


def test_sync_says_what_waits_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    dead = f"http://user:hunter2@127.0.0.1:{free_port()}"
    tracker = Tracker(folder, [MLflowSink(tracking_uri=dead)])
    tracker.open({"a": 1}, {})
    tracker.record(report(0))
    started = time.monotonic()
    tracker.close("FINISHED")
    assert time.monotonic() - started < 5
    capsys.readouterr()
    assert main(["sync", "--dry-run", str(folder)]) == 1
    assert main(["sync", str(folder)]) == 1
    dry, done = capsys.readouterr().out.splitlines()
    assert "operations wait for a new run of http://127.0.0.1:" in dry
    assert "operations wait for a new run of http://127.0.0.1:" in done
    assert "of points, 1 of files" in done
    assert "it does not answer" in done
    assert "delivered" not in done
    assert "hunter2" not in dry + done + (folder / "mlflow.json").read_text()


# 2: one target


def test_a_run_stays_where_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    store = os.environ["MLFLOW_TRACKING_URI"]
    here = tmp_path / "elsewhere"
    here.mkdir()
    folder = tmp_path / "run"
    try:
        tracker = Tracker(folder, [MLflowSink()])
        tracker.open({}, {})
        tracker.record(report(0))
        assert tracker.flush()
        mlflow.set_tracking_uri(f"sqlite:///{here}/b.db")
        tracker.record(report(1))
        assert tracker.flush()
        tracker.record(report(2))
        tracker.abandon()
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
        monkeypatch.chdir(here)
        assert main(["sync", str(folder)]) == 0
        assert list(here.iterdir()) == []
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert mlflow_scalars(state(folder)["run_id"]) == journal_scalars(folder)


def test_the_experiment_is_that_of_the_opening(tmp_path: Path) -> None:
    import mlflow
    from mlflow.tracking import fluent

    try:
        mlflow.set_experiment("first")
        tracker = Tracker(tmp_path / "run", [MLflowSink()])
        tracker.open({}, {})
        mlflow.end_run()
        mlflow.set_experiment("second")
        tracker.record(report(0))
        tracker.close("FINISHED")
    finally:
        fluent._active_experiment_id = None
        os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
    assert tracker.run_id is not None
    client = mlflow.MlflowClient()
    found = client.get_run(tracker.run_id)
    assert client.get_experiment(found.info.experiment_id).name == "first"
    assert found.info.status == "FINISHED"


def test_uris_mean_the_same_everywhere_and_hold_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("mlruns") == str(tmp_path / "mlruns")
    assert absolute_uri("http://host:5000") == "http://host:5000"
    given = "postgresql://me:hunter2@host/db?sslmode=require&password=hunter2"
    assert public_uri(given) == "postgresql://host/db?sslmode=require"


# 3: what cannot succeed holds up nothing


def test_keys_that_mlflow_does_not_take_become_ones_that_it_does(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    tracker = Tracker(tmp_path / "run", [MLflowSink()])
    tracker.open({"optimizer[0].lr": 0.1}, {"": "empty"})
    tracker.log(Logged(0, 1000.0, {"a=b": 1.0, "a@b": 2.0, "../up": 3.0, "k" * 300: 4.0}))
    tracker.record(report(1))
    tracker.close("FINISHED")
    assert state(tmp_path / "run")["refused"] == {}
    assert tracker.run_id is not None
    data = MlflowClient().get_run(tracker.run_id).data
    assert data.params == {"optimizer_0_.lr": "0.1"}
    assert (data.metrics["a_b"], data.metrics["a_b_2"], data.metrics["__/up"], data.metrics["k" * 250]) == (1, 2, 3, 4)
    assert {key: data.tags[f"icr.key.{key}"] for key in ("optimizer_0_.lr", "a_b", "a_b_2", "__/up")} == {
        "optimizer_0_.lr": "optimizer[0].lr", "a_b": "a=b", "a_b_2": "a@b", "__/up": "../up",
    }  # fmt: skip


def test_an_inherited_run_that_is_not_there_makes_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    tracker = Tracker(tmp_path / "run", [MLflowSink()])
    tracker.open({}, {})
    tracker.record(report(1))
    tracker.close("FINISHED")
    assert tracker.run_id != "f" * 32
    assert mlflow_scalars(str(tracker.run_id))["repr/icr"]
    assert "which the server does not have; a new run is made" in capsys.readouterr().err


def test_artifacts_that_cannot_be_stored_hold_up_no_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A root at S3, without boto3."""
    from mlflow import MlflowClient

    assert "boto3" not in sys.modules
    MlflowClient().create_experiment("far", artifact_location="s3://bucket/there")
    tracker = Tracker(tmp_path / "run", [MLflowSink(experiment="far")])
    tracker.open({}, {})
    tracker.record(report(1))
    tracker.close("FINISHED")
    run = MlflowClient().get_run(str(tracker.run_id))
    assert (run.info.status, "repr/icr" in run.data.metrics) == ("FINISHED", True)
    (refused,) = state(tmp_path / "run")["refused"].values()
    assert (refused["what"], "boto" in refused["why"]) == ("picture 'samples' at step 1", True)
    assert "MLflow did not want 1 operations, the first of them picture 'samples'" in capsys.readouterr().err


def test_a_name_that_a_file_store_cannot_have_costs_that_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = str(tmp_path / "mlruns")
    tracker = Tracker(tmp_path / "run", [MLflowSink(tracking_uri=uri)])
    tracker.open({}, {})
    tracker.log(Logged(0, 1000.0, {"loss": 1.0}))
    tracker.log(Logged(1, 1001.0, {"loss/val": 2.0, "lr": 0.5}))
    tracker.log(Logged(2, 1002.0, {"loss": 3.0}))
    tracker.close("FINISHED")
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_run(str(tracker.run_id))
    assert found.info.status == "FINISHED"
    assert [p.value for p in client.get_metric_history(str(tracker.run_id), "loss")] == [1.0, 3.0]
    assert found.data.metrics["lr"] == 0.5
    assert [entry["what"] for entry in state(tmp_path / "run")["refused"].values()] == ["metrics 'loss/val' at step 1"]


def test_what_is_too_large_is_sent_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that answers 413 to more than ten values at a time, and to one of them always."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    real = MlflowClient.log_batch

    def log_batch(self: MlflowClient, run_id: str, metrics: Any = (), **others: Any) -> Any:
        if len(metrics) > 10 or any(metric.key == "v7" for metric in metrics):
            raise MlflowException("API request to endpoint /api/2.0/mlflow/runs/log-batch failed with error code 413 != 200.")
        return real(self, run_id, metrics=metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    tracker = Tracker(tmp_path, [MLflowSink()])
    tracker.open({}, {})
    tracker.record(Report(1, {f"v{i}": float(i) for i in range(50)}))
    tracker.close("FINISHED")
    assert [entry["what"] for entry in state(tmp_path)["refused"].values()] == ["metrics 'v7' at step 1"]
    assert {f"v{i}" for i in range(50) if i != 7} <= set(mlflow_scalars(str(tracker.run_id)))


def test_what_exceptions_say() -> None:
    from mlflow.exceptions import MlflowException

    from mlflow_icr.tracking.mlflow.failures import failure_of
    from mlflow_icr.tracking.sink import Failure

    too_large = MlflowException("API request to endpoint /api/2.0/mlflow/runs/log-batch failed with error code 413 != 200.")
    bad_gateway = MlflowException("API request to endpoint /api/2.0/mlflow/runs/log-batch failed with error code 502 != 200.")
    assert failure_of(too_large) is Failure.REFUSED
    assert failure_of(bad_gateway) is Failure.OUTAGE
    assert failure_of(MlflowException("what")) is Failure.UNCLEAR  # 500, which may pass
    assert failure_of(ConnectionError()) is Failure.OUTAGE


# 4: a folder's second run


def test_a_second_training_in_a_folder_is_refused_before_it_begins(tmp_path: Path) -> None:
    with Tracker(tmp_path / "run", []) as tracker:
        tracker.open({}, {})
        tracker.record(report(0))
        for resume in ("never", "allow"):
            with pytest.raises(ValueError, match=r"another process is writing|which holds a run"):
                Tracker(tmp_path / "run", [], resume=resume)
    with pytest.raises(ValueError, match="which holds a run; expected a new folder, or resume"):
        Tracker(tmp_path / "run", [])
    with pytest.raises(ValueError, match="which holds no run; expected one to resume"):
        Tracker(tmp_path / "other", [], resume="must")
    with pytest.raises(ValueError, match="resume is 'yes'; expected one of never, allow, must"):
        Tracker(tmp_path / "other", [], resume="yes")
    again = Tracker(tmp_path / "run", [], resume="must")
    assert list(again.journal.steps) == [0]
    again.abandon()


# 5 and 6: what belongs to the process


def test_no_setting_of_the_process_changes(tmp_path: Path) -> None:
    before = dict(os.environ)
    tracker = Tracker(tmp_path / "run", [MLflowSink()])
    tracker.open({}, {})
    tracker.record(report(0))
    printed, stop = [], threading.Event()

    def chatter() -> None:
        while not stop.is_set():
            printed.append(sys.stdout)
            time.sleep(0.0005)

    thread = threading.Thread(target=chatter)
    thread.start()
    tracker.close("FINISHED")
    stop.set()
    thread.join()
    assert {id(stream) for stream in printed} == {id(sys.stdout)}
    assert dict(os.environ) == before


# 7: costs


def test_nothing_that_is_done_for_a_row_grows_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict reads a row once, and no event file is read, at whatever row and resumption."""
    from mlflow_icr.monitoring.verdict import VerdictTracker
    from mlflow_icr.tracking.tensorboard import event_file

    judged: list[int] = []
    real = VerdictTracker.add

    def noted(self: VerdictTracker, row: Any) -> Any:
        judged.append(row["images_seen"])
        return real(self, row)

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("an event file is read")

    monkeypatch.setattr(VerdictTracker, "add", noted)
    monkeypatch.setattr(event_file, "events", refuse)
    for first in (0, 50):
        tracker = Tracker(tmp_path, [TensorBoardSink(tmp_path / "tensorboard")], resume="allow")
        tracker.open({}, {})
        for step in range(first, first + 50):
            tracker.record(Report(step, {"repr/icr": 0.5, "repr/icr_debiased": 0.5, "mem/ratio_l2": 0.1}))
        assert tracker.flush()
        tracker.abandon()
    assert judged == [*range(50), *range(100)]  # a row once, and those of before once more when the folder is opened
    shown = tensorboard_scalars(tmp_path / "tensorboard")
    assert [step for step, _ in shown["repr/icr"]] == [step for step, _ in shown["overlay/copies"]] == list(range(100))


def test_catching_up_takes_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    tracker = Tracker(tmp_path, [], mode="disabled")
    for step in range(300):
        tracker.record(Report(step, {"repr/icr": 0.5}))
    tracker.abandon()
    calls: list[int] = []
    real = MlflowClient.log_batch

    def counted(self: MlflowClient, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return real(self, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    assert main(["sync", str(tmp_path)]) == 0
    assert len(calls) < 6
    assert len(mlflow_scalars(state(tmp_path)["run_id"])["repr/icr"]) == 300


# 8: how runs end

ENDING = """
import os, signal, sys, mlflow
from mlflow_icr import Report
from mlflow_icr.tracking import MLflowSink, Tracker
tracker = Tracker(sys.argv[1], [MLflowSink()])
tracker.open({}, {})
tracker.record(Report(1, {"repr/icr": 0.5}))
mlflow.log_metric("beside", 2.0)
"""


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("raise RuntimeError('crash')", "FAILED"),
        ("with tracker:\n    raise RuntimeError('crash')", "FAILED"),
        ("with tracker:\n    pass", "FINISHED"),
        ("os.kill(os.getpid(), signal.SIGTERM)\nimport time; time.sleep(30)", "KILLED"),
        ("", "KILLED"),
    ],
)
def test_every_run_ends(tmp_path: Path, ending: str, status: str) -> None:
    import mlflow

    done = run(ENDING + ending, str(tmp_path / "run"))
    (found,) = mlflow.MlflowClient().search_runs(["0"])
    assert found.info.status == status, done.stderr
    assert (found.data.metrics["repr/icr"], found.data.metrics["beside"]) == (0.5, 2.0)


def test_two_servers_in_one_process(tmp_path: Path) -> None:
    import mlflow

    other = new_store(tmp_path / "other.db")
    near, far = MLflowSink(run_name="near"), MLflowSink(tracking_uri=other, experiment="far", run_name="far")
    tracker = Tracker(tmp_path / "run", [near, far])
    tracker.open({"a": 1}, {})
    assert mlflow.active_run().info.run_id == near.run_id == tracker.run_id
    tracker.record(report(1))
    tracker.close("FINISHED")
    assert mlflow.active_run() is None
    client = mlflow.MlflowClient(other)
    there = client.get_run(str(far.run_id))
    assert (there.info.run_name, client.get_experiment(there.info.experiment_id).name) == ("far", "far")
    for found in (there, mlflow.MlflowClient().get_run(str(near.run_id))):
        assert (found.data.params, found.data.metrics["mem/ratio_l2"]) == ({"a": "1"}, 0.001)
    child = Tracker(tmp_path / "child", [MLflowSink(parent_run_id=near.run_id)])
    child.open({}, {})
    child.close("FINISHED")
    assert mlflow.MlflowClient().get_run(str(child.run_id)).data.tags["mlflow.parentRunId"] == near.run_id


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_modes(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ICR_MODE", mode)
    tracker = Tracker(tmp_path / "run", [MLflowSink(), TensorBoardSink(tmp_path / "run" / "tensorboard")])
    tracker.open({"a": 1}, {})
    tracker.record(report(1))
    tracker.close("FINISHED")
    assert mlflow.MlflowClient().search_runs(["0"]) == []
    assert (tmp_path / "run" / "tensorboard").exists() == (mode == "offline")
    assert main(["sync", str(tmp_path / "run")]) == 0
    (found,) = mlflow.MlflowClient().search_runs(["0"])
    assert (found.info.status, found.data.params, found.data.metrics["mem/ratio_l2"]) == ("FINISHED", {"a": "1"}, 0.001)
    with pytest.raises(ValueError, match="mode is 'away'; expected one of online, offline, disabled"):
        Tracker(tmp_path / "other", [], mode="away")


# 9: other systems, and other processes


def test_it_needs_no_fcntl(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["fcntl"] = None
from mlflow_icr import Report
from mlflow_icr.tracking import TensorBoardSink, Tracker
folder = sys.argv[1]
with Tracker(folder, [TensorBoardSink(folder + "/tensorboard")]) as tracker:
    tracker.open({}, {})
    tracker.record(Report(1, {"repr/icr": 0.5}))
    try:
        Tracker(folder, [], resume="allow")
    except ValueError as error:
        print("refused", "another process" in str(error))
"""
    done = run(code, str(tmp_path / "run"))
    assert done.stdout.split() == ["refused", "True"], done.stderr
    assert tensorboard_scalars(tmp_path / "run" / "tensorboard")["repr/icr"] == [(1, 0.5)]


def test_a_worker_outlives_its_parent_and_keeps_nothing(tmp_path: Path) -> None:
    """It neither holds the folder, nor writes in it."""
    code = """
import os, pickle, sys, time
from mlflow_icr import Report
from mlflow_icr.tracking import Tracker
tracker = Tracker(sys.argv[1], [])
tracker.open({}, {})
tracker.record(Report(1, {"repr/icr": 0.5}))
pickle.loads(pickle.dumps(tracker)).record(Report(3, {"repr/icr": 0.5}))  # as a spawned worker gets it
child = os.fork()
if not child:
    tracker.record(Report(2, {"repr/icr": 0.5}))
    print("child", flush=True)
    time.sleep(60)
time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "child\n"
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        tracker = Tracker(tmp_path / "run", [], resume="allow")
        assert list(tracker.journal.steps) == [1]
        tracker.abandon()
    finally:
        os.killpg(parent.pid, signal.SIGKILL)


# 10: what else was seen


def test_only_our_runs_have_our_tags(tmp_path: Path) -> None:
    import mlflow

    from mlflow_icr.plugin.context import ICRContext

    assert not ICRContext().in_context()
    with mlflow.start_run() as theirs:
        pass
    client = mlflow.MlflowClient()
    assert [key for key in client.get_run(theirs.info.run_id).data.tags if key.startswith("icr.")] == []


def test_pictures_with_slashes_are_told_again(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    picture = np.full((4, 4, 3), 9, np.uint8)
    tracker = Tracker(tmp_path, [])
    tracker.journal.append(Report(5, {"repr/icr": 0.5}, {"a/b": picture, "../c": picture}))
    tracker.abandon()  # before the log had it
    assert not (tmp_path.parent / "c").exists()
    assert main(["sync", str(tmp_path)]) == 0
    names = [file.path for file in MlflowClient().list_artifacts(state(tmp_path)["run_id"], "images")]
    assert len([name for name in names if name.startswith("images/a~b") and name.endswith(".png")]) == 1


# Folders of the format before this one


def test_an_earlier_folder_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its outbox, half of it delivered; values of its own; and TensorBoard's files, which hold other points."""
    from mlflow import MlflowClient
    from torch.utils.tensorboard import SummaryWriter

    client = MlflowClient()
    run_id = client.create_run("0").info.run_id
    client.log_metric(run_id, "repr/icr", 0.5, timestamp=1000, step=0)
    client.log_metric(run_id, "loss", 3.0, timestamp=2000, step=7)
    told = [
        {"kind": "start", "run_id": None, "name": "early", "running": True, "params": {"seed": "1"}, "tags": {"study": "s"}},
        {"kind": "metrics", "step": 0, "time": 1000, "values": {"repr/icr": 0.5}},
        {"kind": "points", "points": [["loss", 3.0, 7, 2000]]},
        {"kind": "metrics", "step": 10, "time": 3000, "values": {"repr/icr": 0.25}},
        {"kind": "table", "to": "tables/t.json", "content": {"columns": ["a"], "data": [[1]]}, "marks": "[]"},
    ]
    (tmp_path / "mlflow.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told))
    kept = {"run_id": run_id, "experiment_id": "0", "acknowledged": 3, "refused": {}, "key": "k"}
    (tmp_path / "mlflow.json").write_text(json.dumps(kept))
    rows = [{"images_seen": 0, "repr/icr": 0.5}, {"images_seen": 10, "repr/icr": 0.25}, {"images_seen": 20, "repr/icr": 0.125}]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "logged").mkdir()
    (tmp_path / "logged" / "values.jsonl").write_text(json.dumps({"step": 7, "time": 2.0, "values": {"loss": 3.0}}) + "\n")
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        writer.add_scalar("repr/icr", 0.5, 0)
    time.sleep(1.1)  # event files are read in the order of their names, which are of seconds
    assert main(["sync", str(tmp_path)]) == 0
    with Tracker(tmp_path, [MLflowSink(), TensorBoardSink(tmp_path / "tensorboard")], resume="must") as tracker:
        tracker.open({"seed": "1"}, {})
        tracker.record(Report(30, {"repr/icr": 0.0625}))
        assert tracker.run_id == run_id
    points = [(step, 0.5 / 2 ** (step // 10)) for step in (0, 10, 20, 30)]
    stored = mlflow_scalars(run_id)
    assert (stored["repr/icr"], stored["loss"]) == (points, [(7, 3.0)])
    found = client.get_run(run_id)
    assert (found.info.status, found.data.params["seed"]) == ("FINISHED", "1")
    assert [file.path for file in client.list_artifacts(run_id, "tables")] == ["tables/t.json"]
    from tests.test_restarts import in_both_readers

    shown = in_both_readers(tmp_path / "tensorboard")
    assert (shown["repr/icr"], shown["loss"]) == (points, [(7, 3.0)])


# Other people's sinks


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for Weights & Biases, which notes what it is told."""
    import types

    told: list[tuple[Any, ...]] = []

    class Run:
        id = "run1"
        config = types.SimpleNamespace(update=lambda values, **options: told.append(("config", dict(values))))
        summary = types.SimpleNamespace(update=lambda values: told.append(("summary", dict(values))))

        def log(self, values: Mapping[str, Any]) -> None:
            told.append(("log", {key: str(value) if not isinstance(value, float) else value for key, value in values.items()}))

        def define_metric(self, *arguments: Any, **options: Any) -> None: ...

        def save(self, path: str, **options: Any) -> None:
            told.append(("save", Path(path).name))

        def finish(self, exit_code: int = 0) -> None:
            told.append(("finish", exit_code))

    stub = types.ModuleType("wandb")
    stub.init = lambda **options: told.append(("init", options)) or Run()  # type: ignore[attr-defined, func-returns-value]
    stub.Image = lambda path: f"Image({Path(path).name})"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return told


def test_the_documented_sink_works(tmp_path: Path, wandb: list[tuple[Any, ...]]) -> None:
    page = (ROOT / "docs" / "built" / "tracking.md").read_text()
    code = page.split('```python title="wandb_sink.py"\n')[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    for step in (1, 2):  # the second time is a resumption
        tracker = Tracker(tmp_path / "run", [names["WandbSink"](project="p")], resume="allow")
        tracker.open({"seed": 3}, {"study": "s"})
        tracker.record(report(step))
        tracker.settle()
        if step == 1:
            tracker.abandon()
    tracker.close("FAILED")
    assert [call[0] for call in wandb if call[0] in ("init", "finish")] == ["init", "init", "finish"]
    assert ("config", {"seed": 3}) in wandb
    logged = [call[1] for call in wandb if call[0] == "log"]
    assert [values["images_seen"] for values in logged if "repr/icr" in values] == [1.0, 2.0]
    assert next(values for values in logged if "samples" in values)["samples"] == "Image(000000000001.png)"
    assert wandb[-1] == ("finish", 1)

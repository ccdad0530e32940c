"""Where a run goes: one server, experiment and run, found out once; and what is said of what waits."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mlflow_icr.cli import main
from mlflow_icr.tracking import MLflowSink, TensorBoardSink, Tracker
from mlflow_icr.tracking.mlflow.target import absolute_uri, public_uri
from tests.servers import free_port
from tests.stores import mlflow_state, new_store
from tests.test_tracking import journal_scalars, mlflow_scalars, report

pytestmark = pytest.mark.usefixtures("quick_attempts")


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
    assert mlflow_scalars(mlflow_state(folder)["run_id"]) == journal_scalars(folder)


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


def test_only_our_runs_have_our_tags(tmp_path: Path) -> None:
    import mlflow

    from mlflow_icr.plugin.context import ICRContext

    assert not ICRContext().in_context()
    with mlflow.start_run() as theirs:
        pass
    client = mlflow.MlflowClient()
    assert [key for key in client.get_run(theirs.info.run_id).data.tags if key.startswith("icr.")] == []

"""What a server does not want holds up nothing: it is set aside alone, with its reason."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from mlflow_icr import Report
from mlflow_icr.tracking import Logged, MLflowSink, Tracker
from tests.stores import mlflow_state
from tests.test_tracking import mlflow_scalars, report

pytestmark = pytest.mark.usefixtures("quick_attempts")


def test_keys_that_mlflow_does_not_take_become_ones_that_it_does(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    tracker = Tracker(tmp_path / "run", [MLflowSink()])
    tracker.open({"optimizer[0].lr": 0.1}, {"": "empty"})
    tracker.log(Logged(0, 1000.0, {"a=b": 1.0, "a@b": 2.0, "../up": 3.0, "k" * 300: 4.0}))
    tracker.record(report(1))
    tracker.close("FINISHED")
    assert mlflow_state(tmp_path / "run")["refused"] == {}
    assert tracker.run_id is not None
    data = MlflowClient().get_run(tracker.run_id).data
    assert data.params == {"optimizer_0_.lr": "0.1"}
    assert (data.metrics["a_b"], data.metrics["a_b_2"], data.metrics["__/up"], data.metrics["k" * 250]) == (1, 2, 3, 4)
    assert {key: data.tags[f"icr.key.{key}"] for key in ("optimizer_0_.lr", "a_b", "a_b_2", "__/up")} == {
        "optimizer_0_.lr": "optimizer[0].lr", "a_b": "a=b", "a_b_2": "a@b", "__/up": "../up",
    }  # fmt: skip


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
    (refused,) = mlflow_state(tmp_path / "run")["refused"].values()
    assert (refused["what"], "boto" in refused["why"]) == ("picture 'samples' at step 1", True)
    assert "MLflow refused 1 operations, the first of them picture 'samples'" in capsys.readouterr().err


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
    assert [entry["what"] for entry in mlflow_state(tmp_path / "run")["refused"].values()] == ["metrics 'loss/val' at step 1"]


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
    assert [entry["what"] for entry in mlflow_state(tmp_path)["refused"].values()] == ["metrics 'v7' at step 1"]
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


def test_a_folder_that_was_removed_is_one_line_at_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ends: list[Any] = []
    monkeypatch.setattr("atexit.register", ends.append)
    tracker = Tracker(tmp_path / "run", [])
    tracker.open({"seed": 0}, {})
    tracker.record(Report(0, {"repr/icr": 0.5}))
    shutil.rmtree(tmp_path / "run")
    (end,) = (one for one in ends if "end_at_exit" in one.__qualname__)
    with caplog.at_level("WARNING"):
        end()
    (line,) = [record.getMessage() for record in caplog.records if "is not ended" in record.getMessage()]
    assert str(tmp_path / "run") in line
    assert not (tmp_path / "run").exists()

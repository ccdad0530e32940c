"""No outage costs a number: servers that are down, die, hang and refuse; trainers that are killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from mlflow_icr import Report
from mlflow_icr.cli import main
from mlflow_icr.tracking import MLflowSink, TensorBoardSink, Tracker, read_history
from mlflow_icr.tracking.event_log import EVENTS
from tests.servers import Postgres, Server
from tests.stores import new_store
from tests.test_tracking import ODD, as_float32, journal_scalars, tensorboard_scalars


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    made = Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    yield made
    made.kill()


def report(step: int) -> Report:
    values = {"repr/icr": ODD[step % 7], "repr/icr_low": 1 / (step + 3), "mem/ratio_l2": step / 1000}
    picture = np.random.default_rng(step).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Report(step, values, {"samples": picture}, distributions={"mem/distance_pixels": np.arange(5.0) + step})


def operations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]


def assert_the_server_has_exactly_the_journal(folder: Path, status: str) -> None:
    """Values, steps, timestamps and pictures: nothing lacks, and nothing is there twice."""
    from mlflow import MlflowClient

    client = MlflowClient()
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    run = client.get_run(run_id)
    assert run.info.status == status
    promised = operations(folder)
    points = Counter(
        (key, operation["step"], operation["time"], value)
        for operation in promised
        if operation["kind"] == "metrics"
        for key, value in operation["values"].items()
    )
    stored = Counter(
        (key, point.step, point.timestamp, point.value)
        for key in run.data.metrics
        for point in client.get_metric_history(run_id, key)
    )
    assert stored == points
    assert max(points.values()) == 1
    for key, series in journal_scalars(folder).items():  # and the promises are the journal
        assert sorted((step, value) for name, step, _, value in points if name == key) == series
    pictures = {(o["key"], o["step"], o["time"]) for o in promised if o["kind"] == "picture"}
    names = [f.path for f in client.list_artifacts(run_id, "images")]
    for suffix in (".png", ".webp"):
        parts = [re.match(r"images/(\w+)\Wstep\W(\d+)\Wtimestamp\W(\d+)\W", name) for name in names if name.endswith(suffix)]
        assert sorted((m[1], int(m[2]), int(m[3])) for m in parts if m is not None) == sorted(pictures)
    assert {(key, step) for key, step, _ in pictures} == {
        (path.parent.name, int(path.stem)) for path in folder.glob("images/*/*.png")
    }


def test_a_server_that_comes_late_dies_and_comes_again(server: Server, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    folder = tmp_path / "run"
    sink = MLflowSink(run_name="late")
    tracker = Tracker(folder, [sink])
    tracker.open({"seed": 1}, {"study": "s"})
    for step in (0, 10):
        tracker.record(report(step))
    server.start()
    tracker.record(report(20))
    tracker.flush_local()
    assert sink.flush()
    server.kill()
    for step in (30, 40):
        tracker.record(report(step))
    tracker.close("FINISHED")  # nobody to tell
    assert main(["sync", str(folder)]) == 1
    server.start()
    for _ in range(2):
        assert main(["sync", str(folder)]) == 0
        assert_the_server_has_exactly_the_journal(folder, "FINISHED")
    (run,) = MlflowClient().search_runs(["0"])
    assert (run.data.params["seed"], run.data.tags["study"], run.info.run_name) == ("1", "s", "late")


def test_a_caller_that_waits_is_not_told_what_the_server_was_a_moment_ago(server: Server, tmp_path: Path) -> None:
    sink = MLflowSink()
    tracker = Tracker(tmp_path / "run", [sink])
    tracker.open({}, {})
    tracker.record(report(0))
    assert not sink.flush()
    server.start()
    sink._reached = (time.monotonic(), False)  # a worker asked just before it came up
    assert sink.flush()
    tracker.close("FINISHED")


def test_a_postgresql_store_gets_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Postgres()
    made = Server(tmp_path, base.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    folder = tmp_path / "run"
    try:
        made.start()
        sink = MLflowSink()
        tracker = Tracker(folder, [sink])
        tracker.open({}, {})
        tracker.record(report(0))
        tracker.flush_local()
        assert sink.flush()
        made.kill()
        tracker.record(report(10))
        tracker.flush_local()
        assert not sink.flush()
        made.start()
        tracker.close("FINISHED")
        assert_the_server_has_exactly_the_journal(folder, "FINISHED")
    finally:
        made.kill()
        base.stop()


def train_until_killed(folder: Path) -> None:
    """What a trainer does, without the training: in a child process, which never comes back."""
    try:
        tracker = Tracker(folder, [MLflowSink(), TensorBoardSink(folder / "tensorboard")], resume="allow")
        tracker.open({"seed": 1}, {})
        step = max(tracker.journal.steps, default=-10) + 10
        while True:
            tracker.record(report(step))
            step += 10
            time.sleep(0.02)
    finally:
        os._exit(1)


@pytest.mark.parametrize("rounds", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], rounds: int) -> None:
    import mlflow  # noqa: F401 - the children start with what is loaded here
    import tensorboard.backend.event_processing.event_accumulator  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    folder = tmp_path / "run"
    moments, begun = random.Random(20260609), False
    server.start()
    for round_ in range(rounds):
        child = os.fork()
        if child == 0:
            train_until_killed(folder)
        time.sleep(moments.uniform(0.05, 1.2))
        if round_ == rounds // 2 - 1:  # and for a while there is no server
            server.kill()
            time.sleep(moments.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        begun |= (folder / "history.jsonl").exists()  # the first kill may come before the first row
        if begun:
            read_history(folder)
        if round_ == rounds - rounds // 3:
            server.start()
    assert len(read_history(folder)) > rounds
    for _ in range(2):
        assert main(["sync", str(folder)]) == 0
        assert_the_server_has_exactly_the_journal(folder, "KILLED")
    sink = MLflowSink()
    tracker = Tracker(folder, [sink, TensorBoardSink(folder / "tensorboard")], resume="allow")
    tracker.open({"seed": 1}, {})
    tracker.close("FINISHED")
    from mlflow import MlflowClient

    assert MlflowClient().get_run(sink.run_id).info.status == "FINISHED"  # type: ignore[arg-type]
    journal, shown = as_float32(journal_scalars(folder)), tensorboard_scalars(folder / "tensorboard")
    assert {key: sorted(set(shown[key])) for key in journal} == journal
    assert max(Counter(shown["repr/icr_low"]).values()) == 1  # also of the row that a kill cut in two


def test_an_answer_that_is_lost_makes_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call to the server works, and then seems to have failed, once."""
    from mlflow import MlflowClient

    folder = tmp_path / "run"
    failed = set()

    def lossy(name: str) -> None:
        real = getattr(MlflowClient, name)

        def call(self: MlflowClient, *arguments: object, **options: object) -> object:
            answer = real(self, *arguments, **options)
            content = (name, *(str(part) for part in (*arguments, *sorted(options.items())) if " at 0x" not in str(part)))
            if threading.current_thread() is not threading.main_thread() and content not in failed:
                failed.add(content)
                raise ConnectionError("the answer is lost")
            return answer

        monkeypatch.setattr(MlflowClient, name, call)

    for name in ("create_run", "log_batch", "log_image"):
        lossy(name)
    monkeypatch.setattr("mlflow_icr.tracking.worker.PAUSES", (0.01,))
    sink = MLflowSink()
    tracker = Tracker(folder, [sink])
    tracker.open({"seed": 1}, {})
    for step in (0, 10, 20):
        tracker.record(report(step))
        tracker.flush_local()
        for _ in range(100):
            if sink.flush():
                break
    assert len(failed) > 8
    tracker.close("FINISHED")
    assert len(MlflowClient().search_runs(["0"])) == 1
    assert_the_server_has_exactly_the_journal(folder, "FINISHED")


def test_half_a_picture_is_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    folder = tmp_path / "run"
    real = MlflowClient._log_artifact_helper
    calls = []

    def half(self: MlflowClient, run_id: str, path: str) -> Any:
        calls.append(path)
        if path.endswith(".webp") and len(calls) < 3:
            raise ConnectionError("between the picture and its thumbnail")
        return real(self, run_id, path)

    monkeypatch.setattr(MlflowClient, "_log_artifact_helper", half)
    monkeypatch.setattr("mlflow_icr.tracking.worker.PAUSES", (0.01,))
    sink = MLflowSink()
    tracker = Tracker(folder, [sink])
    tracker.open({}, {})
    tracker.record(report(0))
    tracker.flush_local()
    sink.flush()
    tracker.close("FINISHED")
    assert [Path(path).suffix for path in calls] == [".png", ".webp", ".png", ".webp"]
    assert_the_server_has_exactly_the_journal(folder, "FINISHED")


def refuse_metric(refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a store that does not want a metric of some name, as one of another version may."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    real = MlflowClient.log_batch

    def log_batch(self: MlflowClient, run_id: str, metrics: Any = (), **others: Any) -> Any:
        if any(metric.key == refused for metric in metrics):
            raise MlflowException(f"Invalid value for metric {refused}", error_code=INVALID_PARAMETER_VALUE)
        return real(self, run_id, metrics=metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)


def test_what_the_server_refuses_does_not_hold_up_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    sink = MLflowSink()
    tracker = Tracker(folder, [sink])
    tracker.open({}, {})
    refuse_metric("a", monkeypatch)
    tracker.metrics({"a": 1.0, "b": 2.0}, 0)
    tracker.record(report(0))
    tracker.close("FINISHED")
    assert "MLflow refuses metrics (Invalid value" in caplog.text
    from mlflow import MlflowClient

    assert sink.run_id is not None
    run = MlflowClient().get_run(sink.run_id)
    assert (run.info.status, run.data.metrics["repr/icr"], run.data.metrics["b"]) == ("FINISHED", ODD[0], 2.0)
    assert main(["sync", str(folder)]) == 1  # offered again, refused again
    assert "refused: operation 1, metrics 'a' at step 0 (Invalid value" in capsys.readouterr().out


def test_a_server_that_hangs_does_not_hold_up_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)  # accepts, and never answers
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:hunter2@127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        sink = MLflowSink()
        tracker = Tracker(tmp_path / "run", [sink])
        tracker.open({}, {})
        for step in range(0, 200, 10):
            tracker.record(report(step))
        tracker.flush_local()
        assert sum(worker.waiting for worker in sink.workers) == tracker.log_file.end.number  # before the first call gave up
        assert sink.failure is None
        tracker.close("FINISHED")
    warnings = [r.getMessage() for r in caplog.records if "MLflow" in r.getMessage()]
    assert [("training goes on" in text, "mlflow-icr sync" in text) for text in warnings] == [(True, False), (False, True)]
    assert "hunter2" not in caplog.text


def test_one_process_delivers_from_a_folder_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path / "run", [MLflowSink()])
    tracker.open({}, {})
    tracker.record(report(0))
    assert main(["sync", str(tmp_path)]) == 2
    assert "is of a run that another process is writing just now" in capsys.readouterr().err
    tracker.close("FINISHED")
    assert main(["sync", str(tmp_path)]) == 0
    assert "everything was delivered to run" in capsys.readouterr().out
    assert main(["sync", str(tmp_path / "nothing")]) == 2
    assert "holds no history.jsonl; expected the output folder of a run or study" in capsys.readouterr().err


def test_everything_can_go_to_another_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    tracker = Tracker(folder, [MLflowSink(run_name="moved")])
    tracker.open({"seed": 1}, {})
    tracker.record(report(0))
    tracker.close("FINISHED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "other.db"))
    monkeypatch.chdir(tmp_path)
    assert main(["sync", "--new-run", str(folder)]) == 0
    assert_the_server_has_exactly_the_journal(folder, "FINISHED")


def test_other_peoples_pictures_and_earlier_tables_are_not_mixed_up(tmp_path: Path) -> None:
    """A picture that is shown at a measurement's own key and step, and tables of the process before."""
    from mlflow import MlflowClient
    from PIL import Image

    folder = tmp_path / "run"
    theirs = np.full((12, 16, 3), 77, dtype=np.uint8)
    for name in ("first", "second"):
        sink = MLflowSink()
        tracker = Tracker(folder, [sink], resume="allow")
        tracker.open({}, {})
        tracker.record(report(0))
        tracker.table(name, [{"a": 1}], 0)
        if name == "second":
            tracker.show(Report(0, {}, {"samples": theirs}))
        tracker.close("FINISHED")
    assert sink.run_id is not None
    client = MlflowClient()
    paths = [f.path for f in client.list_artifacts(sink.run_id, "images") if f.path.endswith(".png")]
    pictures = [np.asarray(Image.open(client.download_artifacts(sink.run_id, path))) for path in paths]
    assert len(pictures) == 2
    for expected in (theirs, report(0).figures["samples"]):
        assert any(np.array_equal(picture, expected) for picture in pictures)
    assert np.array_equal(np.asarray(Image.open(folder / "images/samples/000000000000.png")), report(0).figures["samples"])
    marks = json.loads(client.get_run(sink.run_id).data.tags["mlflow.loggedArtifacts"])
    assert [mark["path"] for mark in marks] == ["tables/first.json", "tables/second.json"]


def test_what_is_to_be_sent_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails once is asked again: nothing is sent that a power cut would have said a second time."""
    from mlflow_icr.tracking import event_log
    from mlflow_icr.tracking.operations import Tags

    box = event_log.EventLog(tmp_path)
    synced: list[Path] = []
    monkeypatch.setattr(event_log, "fsync_path", synced.append)
    box.sync()
    assert not synced  # there was nothing to bring
    box.append([Tags({})])

    def fail(path: Path) -> None:
        raise OSError("input/output error")

    with monkeypatch.context() as once:
        once.setattr(event_log, "fsync_path", fail)
        with pytest.raises(OSError, match="input/output"):
            box.sync()
    box.sync()
    box.sync()
    assert synced == [tmp_path / EVENTS]

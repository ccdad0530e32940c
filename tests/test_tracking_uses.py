"""Uses of a tracker that nobody planned: what is written is right, or a line says what is not."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlflow_icr import Report
from mlflow_icr.tracking import Logged, MLflowSink, TensorBoardSink, Tracker, read_history, read_logged, sync
from mlflow_icr.tracking.event_log import EventLog
from mlflow_icr.tracking.keys import file_key, plain_values
from tests.stores import mlflow_state, new_store
from tests.test_restarts import in_both_readers
from tests.test_tracking import mlflow_scalars, report, tensorboard_scalars

pytestmark = pytest.mark.usefixtures("quick_attempts")


def a_run(folder: Path, values: list[float], *sinks: Any) -> Tracker:
    tracker = Tracker(folder, [MLflowSink(), *sinks])
    tracker.open({}, {})
    for step, value in enumerate(values):
        tracker.log(Logged(step, 1000.0 + step, {"loss": value}))
    tracker.close("FINISHED")
    return tracker


def test_what_an_earlier_run_left_in_a_logdir_or_folder_hides_nothing(tmp_path: Path) -> None:
    board = TensorBoardSink(tmp_path / "board")
    first = a_run(tmp_path / "run", [1.0, 2.0, 3.0, 4.0], board)
    shutil.rmtree(tmp_path / "run")  # but not the logdir
    second = a_run(tmp_path / "run", [5.0, 6.0], TensorBoardSink(tmp_path / "board"))
    assert in_both_readers(tmp_path / "board")["loss"] == [(0, 5.0), (1, 6.0)]
    (tmp_path / "run" / "events.jsonl").unlink()  # but not mlflow.json
    third = a_run(tmp_path / "run", [7.0])
    assert len({first.run_id, second.run_id, third.run_id}) == 3
    assert mlflow_scalars(str(third.run_id)) == {"loss": [(0, 7.0)]}


def test_a_log_that_was_put_back_from_a_copy_is_sent_again_without_repeats(tmp_path: Path) -> None:
    tracker = a_run(tmp_path / "run", [1.0, 2.0], TensorBoardSink(tmp_path / "run"))
    log = tmp_path / "run" / "events.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:2]))
    tracker = Tracker(tmp_path / "run", [MLflowSink(), TensorBoardSink(tmp_path / "run")], resume="must")
    tracker.open({}, {})
    tracker.log(Logged(5, 2000.0, {"loss": 3.0}))
    tracker.close("FINISHED")
    assert mlflow_scalars(str(tracker.run_id))["loss"] == [(0, 1.0), (1, 2.0), (5, 3.0)]
    assert in_both_readers(tmp_path / "run")["loss"] == [(0, 1.0), (5, 3.0)]


def test_a_tracker_whose_folder_was_removed_writes_into_no_later_one(tmp_path: Path) -> None:
    old = Tracker(tmp_path / "run", [MLflowSink(), TensorBoardSink(tmp_path / "run")])
    old.open({"a": "a long parameter, so that its log is the longer one"}, {})
    assert old.flush()
    shutil.rmtree(tmp_path / "run")
    new = Tracker(tmp_path / "run", [MLflowSink()])
    new.open({}, {})
    with pytest.raises(OSError, match="has changed or replaced it"):
        old.close("KILLED")
    new.log(Logged(0, 1000.0, {"loss": 1.0}))
    new.close("FINISHED")
    assert mlflow_scalars(str(new.run_id)) == {"loss": [(0, 1.0)]}
    assert [json.loads(line)["kind"] for line in (tmp_path / "run" / "events.jsonl").open()] == ["params", "metrics", "end"]


def test_a_log_that_was_cut_does_not_keep_a_thread_busy(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    tracker = a_run(tmp_path / "run", [1.0])
    log.path.write_bytes((tmp_path / "run" / "events.jsonl").read_bytes())
    whole = EventLog(tmp_path)
    log.path.write_bytes(b"")
    with pytest.raises(OSError, match="has cut or replaced it"):
        whole.read(tracker.sinks[0].state.cursor("nowhere"), "files")


@pytest.mark.parametrize("uri", ["sqlite:///here.db", "file:./mlruns"])
def test_a_training_may_change_its_folder(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    new_store(tmp_path / "x" / "here.db")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path / "x")
    tracker = Tracker("run", [MLflowSink(), TensorBoardSink("board")])
    tracker.open({}, {})
    monkeypatch.chdir(tmp_path / "y")
    tracker.record(report(1))
    tracker.close("FINISHED")
    assert not list((tmp_path / "y").iterdir())
    monkeypatch.chdir(tmp_path / "x")
    assert mlflow_state(tmp_path / "x" / "run")["refused"] == {}
    assert mlflow_scalars(str(tracker.run_id))["repr/icr"] == [(1, 1 / 3)]
    assert "repr/icr" in in_both_readers(tmp_path / "x" / "board")


def test_steps_and_values_may_be_of_numpy_or_torch(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", [MLflowSink(), TensorBoardSink(tmp_path / "run")])
    tracker.open({}, {})
    tracker.record(Report(np.int64(7), {"repr/icr": torch.tensor(0.5)}))
    tracker.log(Logged(torch.tensor(8), 1000.0, {"loss": np.float32(0.25)}, {"phase": 3}))  # type: ignore[arg-type,dict-item]
    tracker.metrics({"score": np.float64(2)}, np.int32(9))
    tracker.tags({"number": 3})  # type: ignore[dict-item]
    tracker.table("best", [{"rank": 1}], np.int64(9))  # type: ignore[arg-type]
    for wrong in (None, "x", 10**400):
        with pytest.raises(ValueError, match=r"^loss is .*; expected a number$"):
            tracker.log(Logged(9, 1000.0, {"loss": wrong}))  # type: ignore[dict-item]
    tracker.close("FINISHED")
    assert mlflow_state(tmp_path / "run")["refused"] == {}
    assert read_history(tmp_path / "run") == [{"images_seen": 7, "repr/icr": 0.5}]
    stored, shown = mlflow_scalars(str(tracker.run_id)), in_both_readers(tmp_path / "run")
    assert (stored["loss"], stored["repr/icr"], stored["score"]) == ([(8, 0.25)], [(7, 0.5)], [(9, 2.0)])
    assert (shown["loss"], shown["repr/icr"], shown["summary/score"]) == ([(8, 0.25)], [(7, 0.5)], [(9, 2.0)])


def test_odd_values_and_keys_of_accelerate_lose_nothing() -> None:
    sparse = torch.eye(2).to_sparse()
    numbers, texts = plain_values(
        {"损失": 1.0, "精度": 2.0, "huge": 10**400, "meta": torch.zeros(1, device="meta"), "s": sparse}
    )
    assert numbers == {"损失": 1.0, "精度": 2.0}
    assert texts.keys() == {"huge", "meta", "s"}
    assert len({file_key(key) for key in ("a b", "a_b", "ä", "ö", "x" * 300, "x" * 301)}) == 6


def test_pictures_whose_keys_clean_to_the_same_are_two(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    tracker = Tracker(tmp_path / "run", [MLflowSink()])
    tracker.open({}, {})
    picture = np.zeros((2, 2, 3), np.uint8)
    tracker.record(Report(1, {}, {"a b": picture, "a_b": picture}))
    tracker.close("FINISHED")
    pictures = MlflowClient().list_artifacts(str(tracker.run_id), "images")
    assert {file.path.split("+")[0] for file in pictures} == {"images/a_b", "images/a_b_2"}


def test_values_of_one_moment_are_told_apart(tmp_path: Path) -> None:
    """When a batch is sent again, what is there already is left out, and nothing else."""
    tracker = Tracker(tmp_path / "run", [MLflowSink(), TensorBoardSink(tmp_path / "run")])
    tracker.open({}, {})
    for value in (float("nan"), float("inf"), 1.0, 2.0):
        tracker.log(Logged(5, 1000.0, {"loss": value}))
    tracker.log(Logged(2**70, 1000.0, {"far": 1.0}))  # no database has such a step: the batch is halved
    tracker.log(Logged(-3, 1000.0, {"loss": 3.0}))
    tracker.close("FINISHED")
    stored = mlflow_scalars(str(tracker.run_id))["loss"]
    assert [step for step, _ in stored] == [-3, 5, 5, 5, 5]
    assert {value for _, value in stored} > {1.0, 2.0, 3.0}
    assert [entry["what"] for entry in mlflow_state(tmp_path / "run")["refused"].values()] == [f"metrics 'far' at step {2**70}"]


def test_a_point_that_comes_late_in_a_halved_batch_hides_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", [TensorBoardSink(tmp_path / "run")])
    tracker.open({}, {})
    tracker.workers[0].sink.pace = 60.0
    for step in (4, 8):
        tracker.log(Logged(step, 1000.0, {"loss": float(step)}))
    tracker.log(Logged(2**70, 1000.0, {"far": 1.0}))
    tracker.metrics({"score": 8.0}, 8)
    tracker.metrics({"score": 6.0}, 6)
    tracker.close("FINISHED")
    shown = in_both_readers(tmp_path / "run")
    assert (shown["loss"], shown["summary/score"]) == ([(4, 4.0), (8, 8.0)], [(6, 6.0), (8, 8.0)])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_every_open_run_until_the_last_is_closed(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A test before this one may have left a run open, and a handler.
    monkeypatch.setattr("mlflow_icr.tracking.ending._users", [])
    before = signal.signal(number, signal.SIG_DFL)
    first, second = (Tracker(tmp_path / name, []) for name in "ab")
    try:
        first.open()
        second.open()
        first.close("FINISHED")
        assert signal.getsignal(number) is not signal.SIG_DFL
        second.close("FINISHED")
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_program_that_ignores_a_closed_terminal_still_does(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Tracker(tmp_path / "run", []) as tracker:
            tracker.open()
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_spawned_worker_asks_has_an_answer(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", [])
    tracker.open()
    copy = pickle.loads(pickle.dumps(tracker))
    assert (copy.run_id, copy.experiment_id, copy.flush(), copy.verdict.state) == (None, None, True, "undecided")
    copy.picture("a", Path("a.png"), 1)
    copy.artifact(Path("a.txt"))
    copy.describe("line")
    copy.abandon()
    tracker.close("FINISHED")


def test_a_damaged_line_costs_that_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(tmp_path / "run", [TensorBoardSink(tmp_path / "run")], resume="allow")
    tracker.open({}, {})
    tracker.log(Logged(1, 1000.0, {"loss": 1.0}))
    tracker.abandon()
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write("\0" * 40 + '\n{"kind": "of a newer version", "step": 3}\n{"kind": "metrics", "ste\n')
    tracker = Tracker(tmp_path / "run", [MLflowSink(), TensorBoardSink(tmp_path / "run")], resume="allow")
    tracker.open({}, {})
    tracker.log(Logged(2, 1001.0, {"loss": 2.0}))
    tracker.record(report(3))
    tracker.close("FINISHED")
    assert mlflow_scalars(str(tracker.run_id))["loss"] == [(1, 1.0), (2, 2.0)]
    assert in_both_readers(tmp_path / "run")["loss"] == [(1, 1.0), (2, 2.0)]
    (done,) = sync(tmp_path / "run")
    assert [what.partition(", ")[2] for what in done.refused] == [f"line {number} of events.jsonl" for number in (3, 4, 5)]
    assert "events.jsonl, line 4, is left out" in caplog.text


def test_a_call_that_was_interrupted_is_completed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook, after which the training goes on with the same tracker."""
    tracker = Tracker(tmp_path / "run", [MLflowSink(), TensorBoardSink(tmp_path / "run")])
    tracker.open({}, {})
    with monkeypatch.context() as patch:
        patch.setattr(tracker.log_file, "append", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tracker.record(report(1))
    with monkeypatch.context() as patch:
        patch.setattr(tracker.log_file, "_note", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tracker.log(Logged(1, 1000.0, {"loss": 9.0}))
    tracker.log(Logged(2, 1000.0, {"loss": 1.0}))
    tracker.close("KILLED")
    stored = mlflow_scalars(str(tracker.run_id))
    assert (stored["repr/icr"], stored["loss"]) == ([(1, 1 / 3)], [(2, 1.0)])
    assert [row.values for row in read_logged(tmp_path / "run")] == [{"loss": 1.0}]
    assert "repr/icr" in in_both_readers(tmp_path / "run")


def test_what_mlflow_cuts_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path / "run", [MLflowSink()])
    tracker.open({"prompt": "p" * 10_000}, {"notes": "n" * 10_000})
    tracker.close("FINISHED")
    said = capsys.readouterr().err
    assert "MLflow: parameter 'prompt' has 10000 characters, of which it keeps 6000; all are in " in said
    assert "MLflow: tag 'notes' has 10000 characters, of which it keeps 8000; all are in " in said


def test_a_folder_in_use_or_damaged_keeps_no_other_from_being_delivered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow_icr.cli import main

    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_ICR_MODE", "offline")
        for name in "abcd":
            a_run(tmp_path / name, [1.0])
    (tmp_path / "b" / "history.jsonl").write_text("garbage\n")
    (tmp_path / "c" / "mlflow.json").write_text('{"curs')
    used = Tracker(tmp_path / "a", [], resume="allow")
    capsys.readouterr()
    assert main(["sync", str(tmp_path)]) == 1
    used.abandon()
    a, b, c, d = capsys.readouterr().out.splitlines()
    assert "another process is writing" in a
    assert "history.jsonl, line 1: not a measurement" in b
    assert "mlflow.json is damaged" in c
    assert "3 operations delivered" in d
    assert main(["gate", str(tmp_path / "missing"), "--max-copies", "0.1"]) == 2
    assert "which is no folder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="File exists; expected a folder that can be written"):
        Tracker(tmp_path / "file", [])


def test_two_servers_of_one_tracker_are_both_delivered_to_later(tmp_path: Path) -> None:
    uris = [new_store(tmp_path / f"{name}.db") for name in "ab"]
    tracker = Tracker(tmp_path / "run", [MLflowSink(tracking_uri=uri) for uri in uris], mode="offline")
    tracker.open({}, {})
    tracker.log(Logged(1, 1000.0, {"loss": 1.0}))
    tracker.close("FINISHED")
    (tmp_path / "run" / "mlflow-notes.json").write_text("{}")  # somebody's own
    assert [part.complete for part in sync(tmp_path / "run", dry_run=True)] == [False, False]
    done = sync(tmp_path / "run")
    assert [(part.complete, part.target) for part in done] == [(True, uri) for uri in uris]
    assert {len(sync(tmp_path / "run")), len({part.run_id for part in done})} == {2}


def test_a_state_that_cannot_be_written_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(tmp_path / "run", [MLflowSink(), TensorBoardSink(tmp_path / "run")])
    tracker.open({}, {})
    assert tracker.flush()
    full = [OSError(28, "No space left on device")] * 2
    for sink in tracker.sinks:
        write = sink.state.write
        monkeypatch.setattr(sink.state, "write", lambda write=write: (_ for _ in ()).throw(full.pop()) if full else write())
    tracker.log(Logged(1, 1000.0, {"loss": 1.0}))
    tracker.flush()
    tracker.log(Logged(2, 1000.0, {"loss": 2.0}))
    tracker.close("FINISHED")
    assert not full
    assert mlflow_scalars(str(tracker.run_id))["loss"] == [(1, 1.0), (2, 2.0)]
    assert tensorboard_scalars(tmp_path / "run")["loss"] == [(1, 1.0), (2, 2.0)]


def test_steps_that_go_down_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TensorBoard's fast reader shows of two epochs with the same steps the second one."""
    tracker = Tracker(tmp_path / "run", [TensorBoardSink(tmp_path / "run")])
    tracker.open({}, {})
    for step in (0, 1, 0, 1):
        tracker.log(Logged(step, 1000.0, {"loss": 1.0}))
    tracker.close("FINISHED")
    assert capsys.readouterr().err.count("TensorBoard: the steps of 'loss' go down") == 1

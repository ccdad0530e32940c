"""A run folder and the process that writes it: second trainings, ends, children, and what belongs to the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlflow_icr.tracking import MLflowSink, Tracker
from tests import programs
from tests.test_tracking import report, tensorboard_scalars

ROOT = Path(__file__).parents[1]


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


ENDING = """
import os, signal, sys, time, mlflow
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
        ("os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(30)", "KILLED"),
        ("os.kill(os.getpid(), signal.SIGHUP)\ntime.sleep(30)", "KILLED"),  # the terminal was closed
        # As a watch does it, whose scripts end without a word when they have finished:
        ("from mlflow_icr.tracking.ending import end_at_exit\nend_at_exit(tracker.close)\nos.kill(os.getpid(), 15)", "KILLED"),
        ("", "KILLED"),
    ],
)
def test_every_run_ends(tmp_path: Path, ending: str, status: str) -> None:
    import mlflow

    done = programs.run(["-c", ENDING + ending, str(tmp_path / "run")])
    (found,) = mlflow.MlflowClient().search_runs(["0"])
    assert found.info.status == status, done.stderr
    assert (found.data.metrics["repr/icr"], found.data.metrics["beside"]) == (0.5, 2.0)


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
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.split() == ["refused", "True"], done.stderr
    assert tensorboard_scalars(tmp_path / "run" / "tensorboard")["repr/icr"] == [(1, 0.5)]


def test_workers_neither_hold_nor_write_a_folder(tmp_path: Path) -> None:
    """A forked one, which outlives its parent that was killed, and one that was started by spawning."""
    code = """
import multiprocessing, os, sys, time
from mlflow_icr import Report
from mlflow_icr.tracking import Tracker
tracker = Tracker(sys.argv[1], [])
tracker.open({}, {})
tracker.record(Report(1, {"repr/icr": 0.5}))
spawned = multiprocessing.get_context("spawn").Process(target=tracker.record, args=(Report(3, {"repr/icr": 0.5}),))
spawned.start()
spawned.join()
if not os.fork():
    tracker.record(Report(2, {"repr/icr": 0.5}))
    print("spawned", spawned.exitcode, flush=True)
    time.sleep(60)
time.sleep(60)
"""
    parent = programs.start(["-c", code, str(tmp_path / "run")], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        deadline = time.monotonic() + 120
        while not parent.output[0] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert parent.output[0] == "spawned 0\n", parent.output[1]
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        tracker = Tracker(tmp_path / "run", [], resume="allow")
        assert list(tracker.journal.steps) == [1]
        tracker.abandon()
    finally:
        parent.kill()
    assert "this tracker belongs to another process" in parent.output[1]

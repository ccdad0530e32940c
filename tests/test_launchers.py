"""Launchers: each job has a fate of its own, on this machine and as submitit's jobs."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainers.launchers.job import FAILED, FINISHED, KILLED, Ended, Job, was_stopped
from trainers.launchers.local import LocalLauncher, visible_gpus
from trainers.launchers.logs import first_error
from trainers.launchers.slurm import SlurmOptions, minutes


def job(folder: Path, name: str, code: str) -> Job:
    return Job(name, (sys.executable, "-S", "-c", code), folder / name / "config.yaml", folder / "logs" / f"{name}.log")


def ends(launcher: LocalLauncher, jobs: list[Job], wants_stop: Callable[[], bool] = lambda: False) -> dict[str, Ended]:
    return {ended.name: ended for ended in launcher.run(jobs, wants_stop, lambda text: None)}


def test_each_local_job_has_a_fate_of_its_own(tmp_path: Path) -> None:
    secret = "print('trainers.train: error: no https://me:hunter2@host/x'); print('more'); raise SystemExit(2)"
    jobs = [
        job(tmp_path, "good", "print('fine')"),
        job(tmp_path, "bad", "print('before')\nprint(1 / 0)"),
        job(tmp_path, "refused", secret),
        job(tmp_path, "stopped", "import sys; sys.exit(143)"),
        job(tmp_path, "killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        job(tmp_path, "silent", "import sys; sys.exit(3)"),
        Job("none", (str(tmp_path / "no such program"),), tmp_path / "x", tmp_path / "logs" / "none.log"),
        job(tmp_path, "last", "import sys; sys.exit(0)"),
    ]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "silent.log").write_text("OldError: of an earlier attempt\n")
    found = ends(LocalLauncher(2), jobs)
    assert {name: ended.status for name, ended in found.items()} == {
        "good": FINISHED, "bad": FAILED, "refused": FAILED, "stopped": KILLED, "killed": FAILED, "silent": FAILED,
        "none": FAILED, "last": FINISHED,
    }  # fmt: skip
    assert found["bad"].why == "ZeroDivisionError: division by zero"
    assert found["refused"].why == "trainers.train: error: no https://***@host/x"
    assert "SIGKILL" in found["killed"].why
    assert found["silent"].why == "exit status 3"
    assert "no such program" in found["none"].why
    assert (tmp_path / "logs" / "good.log").read_text() == "fine\n"


def test_a_job_that_has_begun_is_resumed(tmp_path: Path) -> None:
    one = job(tmp_path, "a", "import sys; print(sys.argv[1:])")
    assert ends(LocalLauncher(1), [one])["a"].status == FINISHED
    one.begun.parent.mkdir()
    one.begun.write_text("")
    assert ends(LocalLauncher(1), [one])["a"].status == FINISHED
    assert one.log.read_text() == "[]\n['--resume']\n"


def test_slots_share_cores_and_gpus_and_are_never_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setenv("MLFLOW_RUN_ID", "of the study")
    assert visible_gpus() == ["3", "5"]
    code = (
        "import os, time; e = os.environ; s = time.time(); time.sleep(0.3);"
        "print(s, time.time(), e['CUDA_VISIBLE_DEVICES'], e['OMP_NUM_THREADS'], 'MLFLOW_RUN_ID' in e)"
    )
    jobs = [job(tmp_path, str(i), code) for i in range(5)]
    ends(LocalLauncher(2), jobs)
    said = [one.log.read_text().split() for one in jobs]
    assert {threads for *_, threads, _ in said} == {"3"}
    assert {known for *_, known in said} == {"False"}
    spans = [(float(start), float(end), gpu) for start, end, gpu, *_ in said]
    for start, _, gpu in spans:
        others = [other for begin, end, other in spans if begin <= start < end]
        assert len(others) <= 2
        assert others.count(gpu) == 1  # no two at a time on one GPU


def test_a_stop_reaches_the_running_and_starts_no_other(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time; from pathlib import Path;"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)));"
        f"Path({str(tmp_path)!r}, 'running').touch(); time.sleep(60)"
    )
    jobs = [job(tmp_path, "first", code), job(tmp_path, "second", "print('never')")]
    found = ends(LocalLauncher(1), jobs, lambda: (tmp_path / "running").exists())
    assert {name: ended.status for name, ended in found.items()} == {"first": KILLED}
    assert jobs[0].log.read_text() == "saved\n"
    assert not jobs[1].log.exists()


def test_output_is_told_as_it_comes_and_kept(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    jobs = [job(tmp_path, "a", "print('one'); print('two')"), job(tmp_path, "b", "raise ValueError('no')")]
    found = ends(LocalLauncher(2, on_output=lambda name, line: told.append((name, line))), jobs)
    assert [line for name, line in told if name == "a"] == ["one\n", "two\n"]
    assert jobs[0].log.read_text() == "one\ntwo\n"
    assert (found["b"].status, found["b"].why) == (FAILED, "ValueError: no")


def test_leaving_the_loop_leaves_no_child(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    running = LocalLauncher(2).run(
        [job(tmp_path, "long", code), job(tmp_path, "short", "pass")], lambda: False, lambda text: None
    )
    assert next(running).name == "short"
    log = tmp_path / "logs" / "long.log"
    deadline = time.monotonic() + 60
    while not log.read_text().endswith("\n") and time.monotonic() < deadline:
        time.sleep(0.05)
    running.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_the_first_error_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert first_error(log) == ""
    log.write_text("WARNING an error of somebody's\n[rank1]: ValueError: no\nlast\n")
    assert first_error(log) == "[rank1]: ValueError: no"
    assert first_error(log, len("WARNING an error of somebody's\n[rank1]: ValueError: no\n")) == "last"
    assert was_stopped(128 + signal.SIGUSR2)
    assert was_stopped(-signal.SIGTERM)
    assert not was_stopped(0)
    assert not was_stopped(137)


def test_slurm_times_and_options() -> None:
    assert [minutes(text) for text in ("90", "1:30", "1:30:00", "2-12", "2-12:30", "1-00:00:30")] == [
        90,
        2,
        90,
        3600,
        3630,
        1441,
    ]
    with pytest.raises(ValueError, match="time is 'soon'; expected minutes"):
        minutes("soon")
    options = SlurmOptions(nodes=2, gpus_per_node=4, partition="gpu", others={"reservation": "r"})
    assert options.ranks == 8
    parameters = options.parameters("name", 3)
    assert parameters["tasks_per_node"] == parameters["gpus_per_node"] == 4
    assert parameters["slurm_partition"] == "gpu"
    assert parameters["slurm_array_parallelism"] == 3
    assert parameters["slurm_additional_parameters"] == {"requeue": True, "reservation": "r"}
    assert "slurm_account" not in parameters
    with pytest.raises(ValueError, match="nodes is 0; expected a whole number >= 1"):
        SlurmOptions(nodes=0)
    with pytest.raises(ValueError, match="stop_seconds is 120; expected less than the 60 seconds"):
        SlurmOptions(time_minutes=1)

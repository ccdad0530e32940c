"""Runs as Slurm jobs: by submitit on this machine, and by a real cluster of one machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlflow_icr.tracking import read_history
from mlflow_icr.tracking.event_log import ended_as
from tests.slurm import Slurm
from trainers.experiments.sweep.plan import Sweep, plan
from trainers.launchers.job import FAILED, FINISHED, KILLED, RUNNING, Ended, Job
from trainers.launchers.slurm import JOBS, SlurmLauncher, SlurmOptions

pytest.importorskip("submitit")
ROOT = Path(__file__).parents[1]
FLAGS = [
    "--num-images=32", "--total-kimg=6", "--first-measurement-kimg=0.3", "--measurements=3", "--block-channels=16,32",
    "--num-samples=72", "--sample-steps=4", "--batch-size=32", "--probe-views=4",
]  # fmt: skip
# What a trainer does, as far as a launcher sees it: it begins, saves and ends when it is asked to, and resumes to its end.
STAND_IN = """
import os, signal, sys, time
folder, resumed = sys.argv[1], "--resume" in sys.argv
def stop(number, frame):
    print("saved", flush=True)
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, stop)
print("rank", os.environ.get("RANK"), "resumed" if resumed else "begins", flush=True)
os.makedirs(folder, exist_ok=True)
open(f"{folder}/begun", "w").close()
if not resumed:
    time.sleep(300)
open(f"{folder}/done", "w").close()
"""


def wait_for(ready: Callable[[], object], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def stand_in(folder: Path, name: str, code: str = STAND_IN) -> Job:
    command = (sys.executable, "-S", "-c", code, str(folder / name))
    return Job(name, command, folder / name / "begun", folder / "logs" / f"{name}.log")


def launcher_in(folder: Path, options: SlurmOptions, cluster: str = "slurm") -> SlurmLauncher:
    return SlurmLauncher(
        folder / "slurm", options, lambda name: (folder / name / "done").exists(), cluster=cluster, look_every_seconds=0.2
    )  # fmt: skip


def preempt(launcher: SlurmLauncher, name: str) -> None:
    """The signal that Slurm would send to each of a job's tasks."""
    controller = launcher._handles[name].job_id
    for task in Path(f"/proc/{controller}/task/{controller}/children").read_text().split():
        os.kill(int(task), signal.SIGUSR2)


def test_a_preempted_job_goes_back_and_resumes_and_tasks_meet(tmp_path: Path) -> None:
    """By submitit's local executor, which starts again what is handed back to the queue."""
    launcher = launcher_in(tmp_path, SlurmOptions(), "local")
    one, bad = stand_in(tmp_path, "one"), stand_in(tmp_path, "bad", "raise SystemExit('x: error: no')")
    asked = []

    def look() -> bool:
        if not asked and one.begun.exists():
            asked.append(time.monotonic())
            preempt(launcher, "one")
        return False

    found = {ended.name: ended for ended in launcher.run([one, bad], look, lambda text: None)}
    assert found == {"one": Ended("one", FINISHED), "bad": Ended("bad", FAILED, "x: error: no")}
    assert one.log.read_text() == "rank None begins\nsaved\nrank None resumed\n"

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    both = stand_in(tmp_path, "both", f"import os; print(*(os.environ[name] for name in {names}))")
    launcher = launcher_in(tmp_path, SlurmOptions(tasks_per_node=2), "local")
    assert [ended.name for ended in launcher.run([both], lambda: False, lambda text: None)] == ["both"]
    first, second = (path.read_text().split() for path in (both.log, both.log.with_name("both.rank1.log")))
    assert first[:4] == ["0", "0", "2", "2"]
    assert second[:4] == ["1", "1", "2", "2"]
    assert first[4:] == second[4:]


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    yield from cluster(monkeypatch, Slurm())


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    yield from cluster(monkeypatch, Slurm(nodes=2, cpus=1))


def cluster(monkeypatch: pytest.MonkeyPatch, made: Slurm) -> Iterator[Slurm]:
    for name, value in made.variables.items():
        monkeypatch.setenv(name, value)
    yield made
    made.stop()


def hurrying(slurm: Slurm) -> Callable[[], bool]:
    """Something to ask whether to stop: no, but requeued jobs start at once."""
    last = [0.0]

    def look() -> bool:
        if time.monotonic() - last[0] > 1:
            slurm.hurry()
            last[0] = time.monotonic()
        return False

    return look


def test_jobs_on_a_cluster_fail_alone_and_survive_preemption_and_us(tmp_path: Path, slurm: Slurm) -> None:
    options = SlurmOptions(partition="low", cpus_per_task=1, stop_seconds=30)
    short = "import os, sys; os.makedirs(sys.argv[1]); open(sys.argv[1] + '/done', 'w').close()"
    jobs = [stand_in(tmp_path, "good", short), stand_in(tmp_path, "bad", "print('first'); 1 / 0")]
    jobs += [stand_in(tmp_path, name) for name in ("preempted", "signalled")]
    ends: dict[str, Ended] = {}

    def two_are_left() -> bool:
        return len(ends) == 2 and all(job.begun.exists() for job in jobs[2:])

    for ended in launcher_in(tmp_path, options).run(jobs, two_are_left, lambda text: None):
        ends[ended.name] = ended
    assert ends["good"] == Ended("good", FINISHED)
    assert ends["bad"] == Ended("bad", FAILED, "ZeroDivisionError: division by zero")
    assert ends["preempted"].status == ends["signalled"].status == RUNNING
    ids = json.loads((tmp_path / "slurm" / JOBS).read_text())
    array = {name: number.split("_") for name, number in ids.items()}
    assert len({number for number, _ in array.values()}) == 1  # one array
    assert f"job {ids['preempted']} goes on" in ends["preempted"].why

    # What takes the first job's core is short; the second one is told that its time is over, as Slurm does it.
    slurm.run("scancel", "--signal=USR2", ids["signalled"])
    slurm.run("sbatch", "-p", "high", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    said: list[str] = []
    again = {ended.name: ended for ended in launcher_in(tmp_path, options).run(jobs[2:], hurrying(slurm), said.append)}
    assert again == {name: Ended(name, FINISHED) for name in ("preempted", "signalled")}
    assert f"preempted is job {ids['preempted']}, submitted earlier" in said
    for job in jobs[2:]:
        assert job.log.read_text() == "rank None begins\nsaved\nrank None resumed\n", job.name

    # Cancelled by somebody: stopped, and another job goes on with it.
    other = stand_in(tmp_path, "other")

    def cancel_once() -> bool:
        if other.begun.exists() and not said[-1].startswith("cancelled"):
            slurm.run("scancel", json.loads((tmp_path / "slurm" / JOBS).read_text())["other"])
            said.append("cancelled")
        return False

    assert list(launcher_in(tmp_path, options).run([other], cancel_once, said.append)) == [Ended("other", KILLED, "cancelled")]
    assert list(launcher_in(tmp_path, options).run([other], lambda: False, said.append)) == [Ended("other", FINISHED)]

    with pytest.raises(OSError, match=r"Slurm does not take the jobs: .* Invalid partition name specified"):
        list(launcher_in(tmp_path, SlurmOptions(partition="nowhere")).run(jobs[:1], lambda: False, said.append))


def measured(folder: Path) -> list[dict[str, float]]:
    """The history without what depends on the machine's speed."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in read_history(folder)]


def whole(folder: Path) -> list[dict[str, float]]:
    """The history of the same run, never interrupted."""
    command = [sys.executable, "-m", "trainers.train", "--preset=digits", *FLAGS, "--probe-images=32", f"--output-dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=400)
    return measured(folder)


def has_trained(folder: Path) -> bool:
    """Whether there is a checkpoint past the first one, which is saved before anything is measured."""
    return any(int(path.parent.name) for path in folder.glob("checkpoints/[0-9]*/state.safetensors"))


@pytest.mark.slow
def test_a_preempted_training_resumes_exactly(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    sweep: Sweep = plan([*FLAGS, f"--output-dir={tmp_path / 'study'}"])
    (run,) = sweep.runs
    folder = sweep.folder_of(run)
    launcher = SlurmLauncher(
        tmp_path / "slurm", SlurmOptions(), lambda name: ended_as(folder) == FINISHED, cluster="local", look_every_seconds=0.2
    )
    rows = []

    def look() -> bool:
        """Preempt the job once, when it has trained and saved something."""
        if not rows and has_trained(folder):
            rows.append(len(measured(folder)))
            preempt(launcher, run.name)
        return False

    assert list(launcher.run([sweep.job(run)], look, lambda text: None)) == [Ended(run.name, FINISHED)]
    log = sweep.job(run).log.read_text()
    assert log.count("killed: ") == log.count("finished: ") == 1, log
    assert rows[0] < 4
    assert measured(folder) == whole(tmp_path / "whole")
    (alone,) = MlflowClient().search_runs(["0"], "tags.role = 'run'")
    assert alone.info.status == "FINISHED"


@pytest.mark.slow
def test_a_sweep_on_two_nodes_survives_preemption_and_its_own_end(
    tmp_path: Path, two_nodes: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    study = tmp_path / "study"
    command = [sys.executable, "-m", "trainers.experiments.sweep", "--launcher=slurm", f"--output-dir={study}", *FLAGS]
    command += ["--partition=low", "--nodes=2", "--time=10"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder, log = study / "runs" / "n32-seed0", study / "logs" / "n32-seed0.log"
    wait_for(lambda: has_trained(folder), "no checkpoint")
    # The study's process ends; its job stays. A job that comes before it takes the machines, and gives them back.
    first.terminate()
    two_nodes.run("sbatch", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    output, _ = first.communicate(timeout=200)
    assert first.returncode == 143, output
    assert re.search(r"n32-seed0 goes on by itself: job (\d+) goes on; scancel \1 would end it", output), output
    again = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: hurrying(two_nodes)() or again.poll() is not None, "the job does not end", 500)
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert re.search(r"n32-seed0 is job \d+, submitted earlier", output), output
    assert "[1/1] n32-seed0 finished" in output
    assert log.read_text().count("killed: ") == log.read_text().count("finished: ") == 1
    runs = {run.data.tags.get("role"): run for run in MlflowClient().search_runs(["0"])}
    assert {role: run.info.status for role, run in runs.items()} == {"study": "FINISHED", "run": "FINISHED"}
    assert runs["run"].data.params["world_size"] == "2"
    for row, alone in zip(measured(folder), whole(tmp_path / "whole"), strict=True):
        assert row["repr/icr"] == pytest.approx(alone["repr/icr"], rel=1e-3)  # two ranks add up in another order
        assert row["images_seen"] == alone["images_seen"]

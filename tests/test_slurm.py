"""Sweeps as Slurm jobs: by submitit on this machine, and by a real cluster of one machine."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlflow_icr.tracking import read_history
from mlflow_icr.tracking.outbox import ended_as
from tests.slurm import Slurm
from trainers.experiments.sweep_plan import plan
from trainers.launchers.job import FINISHED, Ended
from trainers.launchers.slurm import SlurmLauncher, SlurmOptions

pytest.importorskip("submitit")
ROOT = Path(__file__).parents[1]
FLAGS = [
    "--num-images=32", "--total-kimg=6", "--first-measurement-kimg=0.3", "--measurements=3", "--block-channels=16,32",
    "--num-samples=72", "--sample-steps=4", "--batch-size=32", "--probe-views=4",
]  # fmt: skip


def measured(folder: Path) -> list[dict[str, float]]:
    """The history without what depends on the machine's speed."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in read_history(folder)]


def whole(folder: Path) -> list[dict[str, float]]:
    """The history of the same run, never interrupted."""
    command = [sys.executable, "-m", "trainers.train", "--preset=digits", *FLAGS, "--probe-images=32", f"--output-dir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=400)
    return measured(folder)


def wait_for(ready: object, what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_preempted_job_goes_back_to_the_queue_and_resumes_exactly(tmp_path: Path) -> None:
    """By submitit's local executor, which hands a job the signal that Slurm sends, and starts what is requeued again."""
    from mlflow import MlflowClient

    study = tmp_path / "study"
    sweep = plan([*FLAGS, f"--output-dir={study}"])
    (run,) = sweep.runs
    folder = sweep.folder_of(run)
    launcher = SlurmLauncher(
        study / "slurm", SlurmOptions(), lambda name: ended_as(folder) == FINISHED, cluster="local", look_every_seconds=0.2
    )
    interrupted = []

    def look() -> bool:
        """Preempt the job once, when it has measured something."""
        if not interrupted and list(folder.glob("checkpoints/[0-9]*/state.safetensors")):
            interrupted.append(len(measured(folder)))
            launcher._handles[run.name]._interrupt()
        return False

    said: list[str] = []
    assert list(launcher.run([sweep.job(run)], look, said.append)) == [Ended(run.name, FINISHED)]
    assert interrupted[0] < 4
    log = sweep.job(run).log.read_text()
    assert log.count("killed: ") == 1, log
    assert log.count("finished: ") == 1
    assert measured(folder) == whole(tmp_path / "whole")
    (alone,) = MlflowClient().search_runs(["0"], "tags.role = 'run'")
    assert alone.info.status == "FINISHED"


def test_ranks_of_a_job_meet_and_a_failure_is_that_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    study = tmp_path / "study"
    # Two processes in each job: one that trains, and one that cannot, since its layer is none.
    sweep = plan([*FLAGS, "--total-kimg=0.6", "--layer=decoder,nowhere", f"--output-dir={study}"])
    folders = {run.name: sweep.folder_of(run) for run in sweep.runs}
    launcher = SlurmLauncher(
        study / "slurm",
        SlurmOptions(tasks_per_node=2),
        lambda name: ended_as(folders[name]) == FINISHED,
        cluster="local",
        look_every_seconds=0.2,
    )
    ends = {e.name: e for e in launcher.run([sweep.job(run) for run in sweep.runs], lambda: False, lambda text: None)}
    good, bad = (run.name for run in sweep.runs)
    assert ends[good] == Ended(good, FINISHED)
    assert ends[bad].status == "FAILED"
    assert ends[bad].why.startswith("trainers.train: error: layer is 'nowhere'")
    assert measured(folders[good])
    import yaml
    from mlflow import MlflowClient

    assert yaml.safe_load((folders[good] / "config.yaml").read_text())["layer"] == "decoder"
    (run,) = MlflowClient().search_runs(["0"], "tags.role = 'run'")
    assert run.data.params["world_size"] == "2"


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    cluster = Slurm()
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.stop()


def start(study: Path, *given: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainers.experiments.sweep", "--launcher=slurm", f"--output-dir={study}", *FLAGS, *given]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_sweep_on_a_cluster_survives_preemption_and_its_own_end(tmp_path: Path, slurm: Slurm) -> None:
    from mlflow import MlflowClient

    study = tmp_path / "study"
    first = start(study, "--partition=low", "--cpus-per-task=2")
    folder = study / "runs" / "n32-seed0"
    wait_for(lambda: list(folder.glob("checkpoints/[0-9]*/state.safetensors")), "no checkpoint")
    # The study's process ends; its job stays. A job that comes before it takes the machine, and gives it back.
    first.terminate()
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 143, output
    assert re.search(r"n32-seed0 goes on by itself: job (\d+) goes on; scancel \1 would end it", output), output
    slurm.run("sbatch", "-p", "high", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    log = study / "logs" / "n32-seed0.log"
    wait_for(lambda: "killed: " in log.read_text(), "the trainer does not stop")
    again = start(study, "--partition=low", "--cpus-per-task=2")
    output, _ = again.communicate(timeout=400)
    assert again.returncode == 0, output
    assert re.search(r"n32-seed0 is job \d+, submitted earlier", output), output
    assert "[1/1] n32-seed0 finished" in output
    assert log.read_text().count("finished: ") == 1
    assert measured(folder) == whole(tmp_path / "whole")
    runs = {run.data.tags.get("role"): run.info.status for run in MlflowClient().search_runs(["0"])}
    assert runs["study"] == runs["run"] == "FINISHED"

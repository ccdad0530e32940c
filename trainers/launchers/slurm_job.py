"""The work of each task of a run's Slurm job; it imports no more than starting a trainer needs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from trainers.launchers.job import Job, was_stopped

LOOK_EVERY_SECONDS = 0.2
# After a trainer was stopped by another process: Slurm ends or requeues the job next, when its grace time is over. A job
# that ended by itself before that would not be requeued.
LINGER_SECONDS = 1800.0


class TrainJob:
    """Runs a job's command as one process a task, with the rendezvous of all tasks; a requeued job resumes.

    Slurm signals all processes of a job before it takes the machine away. The trainers of all ranks agree to stop, save, and
    end; then `checkpoint`, which submitit calls on the first task, hands the same job back to the queue.
    """

    def __init__(self, job: Job, stop_seconds: float) -> None:
        self.job, self.stop_seconds = job, stop_seconds
        self._pid: int | None = None

    def __call__(self) -> int:
        """Train; returns the trainer's exit status. Raises RuntimeError when it was stopped and nothing followed."""
        from submitit.helpers import TorchDistributedEnvironment

        ranks = TorchDistributedEnvironment()
        log = log_of(self.job, ranks.rank)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as out:
            child = subprocess.Popen(
                self.job.line(), env=_variables(ranks), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
        self._pid = child.pid
        # Not child.wait(): `checkpoint` interrupts this, and would wait for ever for the lock that wait() holds.
        while child.poll() is None:
            time.sleep(LOOK_EVERY_SECONDS)
        if was_stopped(child.returncode) and ranks.rank == 0:
            time.sleep(LINGER_SECONDS)
            raise RuntimeError("the trainer was stopped from outside, and the job neither ended nor requeued")
        return child.returncode

    def checkpoint(self) -> Any:
        """Stop the trainer, after its checkpoint, and return what the requeued job is to do: submitit's DelayedSubmission."""
        from submitit.helpers import DelayedSubmission

        if self._pid is not None:
            _stop(self._pid, self.stop_seconds)
        return DelayedSubmission(TrainJob(self.job, self.stop_seconds))


def log_of(job: Job, rank: int) -> Path:
    """Where a rank's output goes: the first one's to the run's log, the others' beside it."""
    return job.log if rank == 0 else job.log.with_name(f"{job.log.stem}.rank{rank}{job.log.suffix}")


def _variables(ranks: Any) -> dict[str, str]:
    """The trainer's environment: where the ranks meet, and as many threads as the task has cores."""
    variables = {key: value for key, value in os.environ.items() if key != "MLFLOW_RUN_ID"}
    variables["PYTHONUNBUFFERED"] = "1"
    variables.setdefault("OMP_NUM_THREADS", variables.get("SLURM_CPUS_PER_TASK", "1"))
    if ranks.world_size > 1:
        variables |= {
            "MASTER_ADDR": ranks.master_addr,
            "MASTER_PORT": str(ranks.master_port),
            "RANK": str(ranks.rank),
            "WORLD_SIZE": str(ranks.world_size),
            "LOCAL_RANK": str(ranks.local_rank),
            "LOCAL_WORLD_SIZE": str(ranks.local_world_size),
        }
    return variables


def _stop(pid: int, seconds: float) -> None:
    """Ask a child of this process to stop and wait until it has, without reaping it; kill it when it takes longer."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGTERM)
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(LOOK_EVERY_SECONDS)

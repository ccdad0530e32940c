"""Runs as jobs of a Slurm cluster, through submitit: one job array, of which each job is one run on one or several nodes.

A job that is preempted or runs out of time stops after a checkpoint, goes back to the queue, and resumes there exactly. The
jobs are the cluster's: when this process ends they go on, and the next one finds them by `jobs.json` and waits for them.
"""

from __future__ import annotations

import getpass
import importlib.util
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow_icr.extraction.files import write_whole
from trainers.launchers.job import FAILED, FINISHED, KILLED, RUNNING, Ended, Job
from trainers.launchers.logs import first_error, size
from trainers.launchers.slurm_job import TrainJob

JOBS = "jobs.json"
LOOK_EVERY_SECONDS = 10.0
# States of a job that is over; a preempted one may be on its way back to the queue, so that one look is not enough.
OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
GONE = "gone"  # the queue does not know it any more


@dataclass(frozen=True)
class SlurmOptions:
    """The resources of each job. Raises ValueError for values that no cluster takes."""

    time_minutes: int = 60
    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int = 0  # 0 for one a GPU, or one
    cpus_per_task: int = 0  # 0 for the cluster's default
    mem: str = ""  # of a node, as 32GB
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    stop_seconds: int = 120  # from the signal that a job stops at to its end: a measurement, a checkpoint
    most_timeouts: int = 100  # how often a run that needs more time than a job has is requeued
    others: Mapping[str, str] = field(default_factory=dict)  # of sbatch, by name

    def __post_init__(self) -> None:
        for name, least in (
            ("time_minutes", 1),
            ("nodes", 1),
            ("stop_seconds", 1),
            ("gpus_per_node", 0),
            ("tasks_per_node", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a whole number >= {least}")
        if self.stop_seconds >= 60 * self.time_minutes:
            raise ValueError(
                f"stop_seconds is {self.stop_seconds}; expected less than the {60 * self.time_minutes} seconds of a job"
            )

    @property
    def tasks(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        """Processes of a job."""
        return self.nodes * self.tasks

    def parameters(self, name: str, parallel: int) -> dict[str, Any]:
        """The parameters of submitit's executor, with a job's name and how many run at a time."""
        texts = {key: getattr(self, key) for key in ("mem", "partition", "account", "qos", "constraint") if getattr(self, key)}
        return {
            "name": name,
            "timeout_min": self.time_minutes,
            "nodes": self.nodes,
            "tasks_per_node": self.tasks,
            **({"gpus_per_node": self.gpus_per_node} if self.gpus_per_node else {}),
            **({"cpus_per_task": self.cpus_per_task} if self.cpus_per_task else {}),
            "slurm_array_parallelism": parallel,
            "slurm_signal_delay_s": self.stop_seconds,
            **{f"slurm_{key}": value for key, value in texts.items()},
            # Without it a cluster may be set up not to requeue.
            "slurm_additional_parameters": {"requeue": True, **self.others},
        }


def minutes(text: str) -> int:
    """Minutes of a time as Slurm writes it: 90, 1:30:00 or 2-12:00:00. Raises ValueError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ValueError(f"time is {text!r}; expected minutes, H:MM:SS or D-HH:MM:SS")
    days, *rest = (None if part is None else int(part) for part in match.groups())
    first, second, third = rest
    assert first is not None
    if days is not None:
        seconds = 86400 * days + 3600 * first + 60 * (second or 0) + (third or 0)
    elif third is not None:
        seconds = 3600 * first + 60 * (second or 0) + third
    else:
        seconds = 60 * first + (second or 0)
    return -(-seconds // 60)


def check_cluster() -> None:
    """Raise ValueError where no job can be submitted from."""
    if importlib.util.find_spec("submitit") is None:
        raise ValueError("launcher is 'slurm', which needs submitit: pip install 'mlflow-icr[slurm]'")
    missing = [name for name in ("sbatch", "srun", "squeue", "scontrol") if shutil.which(name) is None]
    if missing:
        raise ValueError(
            f"launcher is 'slurm', but there is no {', '.join(missing)} here; expected a machine of a Slurm cluster"
        )


def queue() -> dict[str, tuple[str, str]] | None:
    """State and reason of each of this user's jobs that the queue still knows, by id; None when it does not answer."""
    # Not sacct, which submitit asks: it needs accounting, and not all clusters have it.
    command = ["squeue", "-h", "-r", "-t", "all", "-u", getpass.getuser(), "-o", "%i|%T|%r"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        return None
    lines = [line.split("|", 2) for line in answer.stdout.splitlines() if line.count("|") >= 2]
    return {number: (state, reason) for number, state, reason in lines}


class SlurmLauncher:
    """Submits to the cluster, and waits. `folder`, on a disk that all nodes see, takes submitit's files and `jobs.json`."""

    def __init__(
        self,
        folder: Path,
        options: SlurmOptions,
        finished: Callable[[str], bool],
        *,
        name: str = "sweep",
        parallel: int = 256,
        cluster: str = "slurm",
        look_every_seconds: float = LOOK_EVERY_SECONDS,
    ) -> None:
        """`finished(name)` says whether a run's folder is complete; `cluster` is submitit's name of a cluster."""
        self.folder, self.options, self.finished = folder, options, finished
        self.name, self.parallel, self.cluster = name, parallel, cluster
        self.look_every_seconds = look_every_seconds
        self._handles: dict[str, Any] = {}  # submitit's jobs, of those that this process submitted

    def run(
        self, jobs: Sequence[Job], wants_stop: Callable[[], bool], echo: Callable[[str], None]
    ) -> Generator[Ended, None, None]:
        """Yield each job's outcome as it ends; after `wants_stop` the rest is left to the cluster, and yielded as RUNNING."""
        since = {job.name: size(job.log) for job in jobs}
        ids = self._known({job.name for job in jobs})
        for name, number in ids.items():
            echo(f"{name} is job {number}, submitted earlier")
        new = [job for job in jobs if job.name not in ids]
        if new:
            ids |= self._submit(new)
            self._remember(ids)
            for job in new:
                echo(f"{job.name} is job {ids[job.name]}; its output goes to {job.log}")
        unfinished = {job.name: job for job in jobs}
        last: dict[str, tuple[str, str]] = {}  # state and reason of each job when it was last looked at
        while unfinished and not wants_stop():
            states = self._look({name: ids[name] for name in unfinished})
            for name, (state, reason) in states.items():
                before, last[name] = last.get(name), (state, reason)
                if (state in OVER or state == GONE) and before is not None and (before[0] in OVER or before[0] == GONE):
                    job = unfinished.pop(name)
                    yield self._ended(job, before[0] if state == GONE else state, since[name])
                elif before != last[name] and state not in OVER and state != GONE:
                    waits = state == "PENDING" and reason not in ("None", "")
                    echo(f"{name} (job {ids[name]}) is {state.lower()}{f': {reason}' if waits else ''}")
            self._sleep(wants_stop)
        for name in unfinished:
            yield Ended(name, RUNNING, f"job {ids[name]} goes on; scancel {ids[name]} would end it")

    def _sleep(self, wants_stop: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.look_every_seconds
        while time.monotonic() < deadline and not wants_stop():
            time.sleep(min(0.2, self.look_every_seconds))

    def _known(self, names: set[str]) -> dict[str, str]:
        """Jobs of an earlier process that the queue still has. Raises OSError when the queue does not answer."""
        path = self.folder / JOBS
        if not path.exists():
            return {}
        recorded = {name: number for name, number in json.loads(path.read_text()).items() if name in names}
        queued = queue() if recorded else {}
        if queued is None:
            raise OSError("squeue does not answer, so it is not known whether jobs of this study are still running")
        return {name: number for name, number in recorded.items() if number in queued and queued[number][0] not in OVER}

    def _remember(self, ids: Mapping[str, str]) -> None:
        path = self.folder / JOBS
        recorded = json.loads(path.read_text()) if path.exists() else {}
        content = json.dumps(recorded | dict(ids), indent=1)
        write_whole(path, lambda file: file.write(content.encode()))

    def _submit(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Submit all as one array; returns their ids by name. Raises OSError with what sbatch says."""
        import submitit

        self.folder.mkdir(parents=True, exist_ok=True)
        for job in jobs:
            job.log.parent.mkdir(parents=True, exist_ok=True)
        executor = submitit.AutoExecutor(
            self.folder.resolve(), cluster=self.cluster, slurm_max_num_timeout=self.options.most_timeouts
        )
        executor.update_parameters(**self.options.parameters(self.name, self.parallel))
        # A measurement in progress must end before the checkpoint; the 15 seconds are for Slurm itself.
        work = [TrainJob(job, max(1.0, self.options.stop_seconds - 15.0)) for job in jobs]
        try:
            submitted = executor.submit_array(work)
        except Exception as error:  # submitit's, which is not a public type, with what sbatch wrote
            lines = [line for line in str(error).splitlines() if "error" in line] or str(error).splitlines() or [repr(error)]
            raise OSError(f"Slurm does not take the jobs: {lines[-1].strip()}") from error
        self._handles = {job.name: handle for job, handle in zip(jobs, submitted, strict=True)}
        return {name: handle.job_id for name, handle in self._handles.items()}

    def _look(self, ids: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """State and reason of each job, by name; nothing while the queue does not answer."""
        if self.cluster != "slurm":
            return {name: ("COMPLETED" if self._handles[name].done() else "RUNNING", "") for name in ids}
        queued = queue()
        return {} if queued is None else {name: queued.get(number, (GONE, "")) for name, number in ids.items()}

    def _ended(self, job: Job, state: str, since: int) -> Ended:
        """The outcome of a job that is over: from its folder, else from Slurm and the logs."""
        if self.finished(job.name):
            return Ended(job.name, FINISHED)
        if state == "CANCELLED":
            return Ended(job.name, KILLED, "cancelled")
        # A job's other ranks may have failed first: they are read where the first one's log has nothing.
        logs = [job.log, *sorted(job.log.parent.glob(f"{job.log.stem}.rank*{job.log.suffix}"))]
        error = next((text for text in (first_error(log, since if log == job.log else 0) for log in logs) if text), "")
        slurm_state = "" if state in ("COMPLETED", "FAILED", GONE) else f"Slurm says {state}"
        reasons = filter(None, (slurm_state, error))
        return Ended(job.name, FAILED, "; ".join(reasons) or f"no output; submitit's is in {self.folder}")

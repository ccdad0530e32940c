"""Runs as processes of this machine, some at a time, each with its share of the cores and, where there are several, a GPU."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from trainers.launchers.job import FAILED, FINISHED, KILLED, Ended, Job, was_stopped
from trainers.launchers.logs import first_error, size
from trainers.launchers.processes import end_children, environment

LOOK_EVERY_SECONDS = 0.2


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; torch is not imported."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


@dataclass(frozen=True)
class _Running:
    job: Job
    child: subprocess.Popen[str]
    slot: int
    since: int  # bytes of the log before this attempt
    copier: threading.Thread | None  # that copies its output to the log and to the terminal


class LocalLauncher:
    """At most `parallel` processes at a time; `inherited` file descriptors stay open in each as long as it lives.

    `on_output(name, line)` is called with every line of output as it comes; the job's log has it too. Each job gets one of
    several GPUs, unless jobs of several ranks are to share them all.
    """

    def __init__(
        self,
        parallel: int,
        inherited: Sequence[int] = (),
        on_output: Callable[[str, str], None] | None = None,
        *,
        one_gpu_each: bool = True,
    ) -> None:
        self.parallel, self.inherited, self.on_output, self.one_gpu_each = parallel, tuple(inherited), on_output, one_gpu_each

    def run(
        self, jobs: Sequence[Job], wants_stop: Callable[[], bool], echo: Callable[[str], None]
    ) -> Generator[Ended, None, None]:
        """Yield each job's outcome as it ends. After `wants_stop`, running jobs are asked to stop, and no other one starts.

        No child is left running, however this ends.
        """
        parallel = max(1, min(self.parallel, len(jobs)))
        shared, gpus = environment(parallel), visible_gpus()
        waiting, running = deque(jobs), list[_Running]()
        free = deque(range(parallel))
        try:
            while (waiting or running) and not wants_stop():
                if waiting and free:
                    job, slot = waiting.popleft(), free.popleft()
                    gpu = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if self.one_gpu_each and len(gpus) > 1 else {}
                    try:
                        running.append(self._start(job, shared | gpu, slot))
                        echo(f"{job.name} starts; its output is in {job.log}")
                    except OSError as error:  # no memory for a process, or no disk for a log
                        free.append(slot)
                        yield Ended(job.name, FAILED, str(error))
                    continue
                for attempt in [attempt for attempt in running if attempt.child.poll() is not None]:
                    running.remove(attempt)
                    free.append(attempt.slot)
                    yield _ended(attempt)
                time.sleep(LOOK_EVERY_SECONDS)
            end_children([attempt.child for attempt in running])
            stopped, running = running, []
            for attempt in stopped:
                yield _ended(attempt, asked=True)
        finally:
            end_children([attempt.child for attempt in running])

    def _start(self, job: Job, variables: dict[str, str], slot: int) -> _Running:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        since = size(job.log)
        with job.log.open("a") as log:
            child = subprocess.Popen(
                job.line(),
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log if self.on_output is None else subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # Ctrl-C reaches us alone, and we ask the children once
                pass_fds=self.inherited,
            )
        copier = None
        if self.on_output is not None:
            copier = threading.Thread(target=_copy_output, args=(job, child, self.on_output), daemon=True)
            copier.start()
        return _Running(job, child, slot, since, copier)


def _copy_output(job: Job, child: subprocess.Popen[str], on_output: Callable[[str, str], None]) -> None:
    assert child.stdout is not None
    with job.log.open("a") as log:
        for line in child.stdout:
            log.write(line)
            log.flush()
            on_output(job.name, line)


def _ended(attempt: _Running, *, asked: bool = False) -> Ended:
    if attempt.copier is not None:
        attempt.copier.join()
    job, code = attempt.job, attempt.child.returncode
    if code == 0:
        return Ended(job.name, FINISHED)
    if asked or was_stopped(code):
        return Ended(job.name, KILLED)
    if code < 0:
        name = signal.Signals(-code).name
        return Ended(job.name, FAILED, f"ended by {name}" + (", as when memory runs out" if name == "SIGKILL" else ""))
    return Ended(job.name, FAILED, first_error(job.log, attempt.since) or f"exit status {code}")

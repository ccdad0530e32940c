"""Several ranks from one command: `--num-processes N` starts them by torchrun, and is one fate with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainers.config import TrainConfig

GRACE_SECONDS = 300  # for ranks that were asked to stop: their step or measurement in progress, and the checkpoint


def is_launched() -> bool:
    """Whether torchrun or accelerate has started this process as one of several ranks."""
    return "RANK" in os.environ


def check_processes(count: int, config: TrainConfig) -> None:
    """Raise ValueError for a number of ranks that cannot be started here, or that the batch cannot be divided among."""
    if count < 1:
        raise ValueError(f"num_processes is {count}; expected a whole number >= 1")
    if count > 1:
        import torch

        devices = torch.cuda.device_count()
        if 0 < devices < count:
            raise ValueError(f"num_processes is {count}; expected at most {devices}, the CUDA devices of this machine")
    share = count * config.gradient_accumulation_steps
    if config.batch_size % share:
        raise ValueError(
            f"batch_size is {config.batch_size}; expected a multiple of {share}, the ranks times gradient_accumulation_steps"
        )


def launch(count: int, arguments: Sequence[str], output_dir: Path) -> int:
    """Run `trainers.train` with these arguments on several ranks; returns 0, or 128 + signal when stopped, or what a rank left.

    Ctrl-C and SIGTERM reach the ranks as one SIGTERM: they save a checkpoint and end. When a rank fails, torchrun shows its
    error and ends the others, and the run is FAILED, also where the failing rank is the one that logs.
    """
    asked: list[int] = []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [f"--shutdown-timeout={GRACE_SECONDS}", "-m", "trainers.train", *arguments]
    environment = dict(os.environ)
    if "OMP_NUM_THREADS" not in environment:  # torchrun's own choice is 1, with a warning
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment["OMP_NUM_THREADS"] = str(max(1, cores // count))
    # A session of its own: Ctrl-C reaches this process alone, which asks once; twice is at once, for a rank.
    child = subprocess.Popen(command, env=environment, start_new_session=True)

    def ask(number: int, frame: object) -> None:
        if not asked:
            child.terminate()
        elif number == signal.SIGINT:
            os.killpg(child.pid, signal.SIGKILL)
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status == 0:
        return 0
    _end_run(output_dir, "KILLED" if asked else "FAILED")
    return 128 + asked[0] if asked else 1 if status < 0 else status


def _end_run(output_dir: Path, status: str) -> None:
    """End the run in MLflow, where the rank that logs has not come to it."""
    from mlflow_icr.tracking.outbox import OPERATIONS
    from mlflow_icr.tracking.sync import sync_folder

    if (output_dir / OPERATIONS).exists():
        sync_folder(output_dir, status=status)

"""Start several ranks from one command: `--num-processes N` starts them by torchrun, and they end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow_icr.environment import cores
from trainers.config import TrainConfig
from trainers.launchers.job import stop_signals
from trainers.launchers.processes import GRACE_SECONDS


def is_launched() -> bool:
    """Whether torchrun or accelerate has started this process as one of several ranks."""
    return "RANK" in os.environ


def check_launcher(environment: Mapping[str, str]) -> None:
    """Raise ValueError if `accelerate launch` has set up, by its variables, something that is not supported here."""
    engine = next((name for name in ("DEEPSPEED", "MEGATRON_LM") if environment.get(f"ACCELERATE_USE_{name}") == "true"), None)
    if environment.get("ACCELERATE_USE_FSDP") == "true" and environment.get("FSDP_VERSION", "1") != "2":
        engine = "FSDP 1"
    if engine is not None:
        raise ValueError(f"distributed_type is {engine}; expected one process, DDP (MULTI_GPU), or FSDP with fsdp_version 2")
    if (precision := environment.get("ACCELERATE_MIXED_PRECISION", "no")) not in ("no", "bf16", "fp16"):
        raise ValueError(f"mixed_precision is {precision!r}, from accelerate's launcher; expected one of no, bf16, fp16")


def check_processes(count: int, config: TrainConfig) -> None:
    """Raise ValueError for a number of ranks that cannot be started here, or that the batch cannot be divided among."""
    if count < 1:
        raise ValueError(f"num_processes is {count}; expected a whole number >= 1")
    if count > 1:
        import torch

        devices = torch.cuda.device_count()
        if 0 < devices < count:
            raise ValueError(f"num_processes is {count}; expected at most {devices}, the CUDA devices of this machine")
    config.check_ranks(count)


def launch(count: int, arguments: Sequence[str], output_dir: Path) -> int:
    """Run `trainers.train` with these arguments on several ranks; returns 0, 128 + signal, or the status of a failed rank.

    A signal that stops a trainer (`stop_signals`) reaches the ranks as one SIGTERM: they save and end.
    When a rank fails, torchrun ends the others, and the run is FAILED, even if the failed rank is the one that logs.
    """
    received: list[int] = []  # signals
    command = [sys.executable, "-m", "trainers.launchers.ranks", "--standalone", f"--nproc-per-node={count}"]
    command += [f"--shutdown-timeout={int(GRACE_SECONDS)}", "-m", "trainers.train", *arguments]
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))  # torchrun's own choice is 1, with a warning
    # A session of its own: Ctrl-C reaches this process alone, which sends one SIGTERM.
    child = subprocess.Popen(command, env=environment, start_new_session=True)

    def forward(number: int, frame: object) -> None:
        if not received:
            child.terminate()
        received.append(number)

    handlers = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        status = child.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if status == 0:
        return 0
    _end_run(output_dir, "KILLED" if received else "FAILED")
    return 128 + received[0] if received else 1 if status < 0 else status


def _end_run(output_dir: Path, status: str) -> None:
    """End the run in MLflow, if the rank that logs has not done so."""
    from mlflow_icr.tracking.folder import holds_run
    from mlflow_icr.tracking.mlflow.sync import deliver_folder

    if holds_run(output_dir):
        try:
            deliver_folder(output_dir, status=status)
        except (ValueError, OSError) as error:  # a damaged journal, a full disk, a rank that is still there
            print(f"trainers.train: error: the run is not ended in MLflow: {error}", file=sys.stderr)

"""Trainings that are launched, configured, killed and damaged from outside come to what they would have come to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mlflow_icr.tracking import read_history
from tests.servers import free_port
from tests.training import SHORT, measured, run, run_here
from trainers.checkpoint import latest_checkpoint


@pytest.mark.slow
def test_a_launchers_configuration_is_honoured(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    settings = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "use_cpu": True, "num_processes": 1,
        "mixed_precision": "bf16", "dynamo_config": {"dynamo_backend": "EAGER"},
    }  # fmt: skip
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={tmp_path / 'accelerate.yaml'}"]
    command += ["-m", "trainers.train", *SHORT, f"--output-dir={tmp_path / 'run'}"]
    environment = os.environ | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    (found,) = MlflowClient().search_runs(["0"])
    shown = {key: found.data.params[key] for key in ("mixed_precision", "gradient_accumulation_steps", "dynamo_backend")}
    assert shown == {"mixed_precision": "bf16", "gradient_accumulation_steps": "2", "dynamo_backend": "EAGER"}


def ranks_of(folder: Path) -> dict[int, int]:
    """The processes of the ranks that train into a folder, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        rank = [v for v in variables if v.startswith(b"RANK=")]
        if rank and f"--output-dir={folder}".encode() in words:
            found[int(rank[0].removeprefix(b"RANK="))] = int(process.name)
    return found


def started(folder: Path, *flags: str, until: str) -> subprocess.Popen[str]:
    """A training on two ranks that has come to a checkpoint."""
    command = [sys.executable, "-m", "trainers.train", *SHORT, f"--output-dir={folder}", "--num-processes=2", *flags]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    while not (folder / "checkpoints" / until).exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (folder / "checkpoints" / until).exists()
    return child


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
@pytest.mark.parametrize("stopped", [False, True])
def test_ranks_of_one_command_share_one_fate(whole: tuple[Path, str], tmp_path: Path, stopped: bool) -> None:
    """Rank 0 is killed: FAILED; resumed and stopped: KILLED; resumed again, it ends as a run that nothing happened to."""
    from mlflow import MlflowClient

    def status() -> str:
        (found,) = MlflowClient().search_runs(["0"])  # one run, all the time
        return str(found.info.status)

    folder = tmp_path / "run"
    child = started(folder, until="000000000000")
    os.kill(ranks_of(folder)[0], signal.SIGKILL)
    error = child.communicate(timeout=400)[1]
    assert child.returncode == 1
    assert "trainers.train: error: rank 0 was ended by SIGKILL" in error
    assert status() == "FAILED"
    assert not ranks_of(folder)
    if stopped:
        child = started(folder, "--resume", until="000000000320")
        child.terminate()
        child.communicate(timeout=400)
        assert child.returncode in (128 + signal.SIGTERM, 0)  # 0 when it came to its end before
        if child.returncode:
            assert status() == "KILLED"
    # To the end, or to the second measurement.
    done = run(folder, "--resume", "--num-processes=2", *([] if stopped else ["--total-kimg=0.3", "--measurements=2"]))
    assert done.returncode == 0, done.stderr
    assert status() == "FINISHED"
    one, two = measured(whole[0]), measured(folder)
    if stopped:
        assert [row.keys() for row in one] == [row.keys() for row in two]
    one = one if stopped else one[:2]
    for a, b in zip(one, two, strict=True):
        # The same images, noise and views; gradients are summed in another order, in float32, over 38 steps.
        for key in ("loss/train", "repr/icr", "repr/trace_residual"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=2e-3), (key, a["images_seen"])


@pytest.mark.slow
def test_two_machines_train_one_run(whole: tuple[Path, str], tmp_path: Path) -> None:
    """Two launchers with a rank each, which meet at an address of this machine."""
    port = free_port()
    launch = [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--master-addr=127.0.0.1",
        f"--master-port={port}",
    ]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    train = ["-m", "trainers.train", *SHORT, f"--output-dir={tmp_path / 'run'}"]
    machines = []
    for place in range(2):
        command = [sys.executable, *launch, f"--master-port={port}", f"--node-rank={place}", *train]
        machines.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for machine in machines:
        error = machine.communicate(timeout=600)[1]
        assert machine.returncode == 0, error
    for a, b in zip(measured(whole[0]), measured(tmp_path / "run"), strict=True):
        assert b["repr/icr"] == pytest.approx(a["repr/icr"], rel=2e-3)


def test_a_damaged_checkpoint_is_seen_and_the_one_before_is_taken(
    whole: tuple[Path, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(whole[0], tmp_path / "run", ignore=shutil.ignore_patterns("mlflow*"))
    folders = sorted((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    state = folders[-1] / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1  # one bit
    state.write_bytes(content)
    assert latest_checkpoint(tmp_path / "run") == folders[-2]
    assert f"{folders[-1]} is damaged; it is not used" in caplog.text
    done = run_here(tmp_path / "run", "--resume")
    assert done.returncode == 0, done.stderr
    assert measured(tmp_path / "run") == measured(whole[0])
    assert state.read_bytes() != bytes(content)  # written anew
    for folder in folders:
        (folder / "progress.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="whose checkpoints are damaged; expected one to resume from"):
        latest_checkpoint(tmp_path / "run")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system")
@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_a_line_and_the_last_checkpoint(whole: tuple[Path, str], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2600k", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system here: {mounted.stderr.strip()}")
    try:
        done = run(disk / "run")
        assert done.returncode == 1
        assert done.stderr.count("Traceback") == 0
        assert "No space left on device" in done.stderr.splitlines()[-1]
        assert "continue with --resume when that is fixed" in done.stderr.splitlines()[-1]
        newest = latest_checkpoint(disk / "run")
        assert newest is not None
        rows = len(read_history(disk / "run"))
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        done = run(disk / "run", "--resume")
        assert done.returncode == 0, done.stderr
        assert rows < len(measured(whole[0]))
        assert measured(disk / "run") == measured(whole[0])
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

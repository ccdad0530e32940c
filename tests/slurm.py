"""A Slurm cluster of this machine alone, for tests: its own key, ports and folders, as root."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")

# Two partitions on the same node: jobs of the second take it from jobs of the first, which go back to the queue.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_min_interval=100000,bf_interval=1
MailProg=/bin/true
ReturnToService=2
KillWait=30
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=0
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


class Slurm:
    """munged, slurmctld and a slurmd for each node, which are stopped together; `variables` are what clients need."""

    def __init__(self, nodes: int = 1, cpus: int = 2) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            pytest.skip(f"Slurm is not installed: no {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge)")
        if os.geteuid() != 0:
            pytest.skip("a Slurm of one's own needs root")
        # munged wants each folder above its socket to be safe and open to all: pytest's are for their own user alone.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        self.host = socket.gethostname().split(".")[0]
        # Two nodes at most: ranks meet at a node's name, and these are the two that lead to this machine.
        self.names = [self.host, "localhost"][:nodes]
        lines = [
            f"NodeName={name} NodeHostname={self.host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={cpus} RealMemory=1000"
            for name in self.names
        ]
        self.configuration = self.folder / "slurm.conf"
        self.configuration.write_text(
            CONFIGURATION.format(host=self.host, controller=free_port(), folder=self.folder, nodes="\n".join(lines))
        )
        self.variables = {"SLURM_CONF": str(self.configuration)}
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        own = [
            f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("key-file", "log-file", "pid-file", "seed-file")
        ]
        self._spawn("munged", "--foreground", f"--socket={self.folder}/munge.socket", *own)
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._spawn("slurmctld", "-D", "-f", str(self.configuration))
        for name in self.names:
            self._spawn("slurmd", "-D", "-f", str(self.configuration), "-N", name)
        self._wait(lambda: set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) == set(self.names), "slurmd")

    def _spawn(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("ab")
        self._processes.append(
            subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=self._environment())
        )
        log.close()

    def _environment(self) -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if not key.startswith("SLURM")} | self.variables

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            said = "\n".join(path.read_text()[-1500:] for path in [*self.folder.glob("*.out"), *self.folder.glob("*.log")])
            assert all(process.poll() is None for process in self._processes), said
            assert time.monotonic() < deadline, f"{what} does not come up: {said}"
            time.sleep(0.1)

    def run(self, *command: str) -> str:
        """What a client prints; empty when it fails."""
        return subprocess.run(command, capture_output=True, text=True, env=self._environment(), timeout=120).stdout

    def hurry(self) -> None:
        """Start requeued jobs now: Slurm lets them wait two minutes, as long as their old credentials hold."""
        for line in self.run("squeue", "-h", "-r", "-t", "pending", "-o", "%i %r").splitlines():
            job, _, reason = line.partition(" ")
            if reason == "BeginTime":
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def stop(self) -> None:
        """End all jobs, then all daemons."""
        if (self.folder / "slurmctld.pid").exists():
            self.run("scancel", "-u", "root")
            deadline = time.monotonic() + 20
            while self.run("squeue", "-h").strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self._processes):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

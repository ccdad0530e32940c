"""Programs in processes of their own that need not import everything again: forked from one that has, and ended as any are.

A new interpreter takes seconds to import torch, diffusers and MLflow. Here one does that for all tests of a process, and each
program is a fork of it, with a process group, output, environment and folder of its own, and its own uncaught exceptions,
signals and exit handlers. For what is to be seen of an import, or of memory, take a new interpreter.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "accelerate", "diffusers", "diffusers.models.unets.unet_2d", "diffusers.schedulers.scheduling_ddpm", "matplotlib.figure",
    "mlflow", "mlflow.pyfunc", "mlflow.server.fastapi_app", "mlflow.store.tracking.sqlalchemy_store", "pandas", "scipy.stats",
    "sklearn.datasets", "sklearn.neighbors", "tensorboard.backend.event_processing.event_file_loader",
    "tensorboard.compat.proto.event_pb2", "torch", "uvicorn", "mlflow_icr.cli", "mlflow_icr.integrations.accelerate",
    "mlflow_icr.tracking", "trainers.train",
)  # fmt: skip


class Program:
    """A program that runs; its output is in files."""

    def __init__(self, server: _Server, pid: int, arguments: Sequence[str], outputs: tuple[Path, Path]) -> None:
        self._server, self.pid, self.args, self._outputs = server, pid, list(arguments), outputs
        self._ended: int | None = None

    @property
    def output(self) -> tuple[str, str]:
        """What it has printed so far, on stdout and on stderr."""
        return self._outputs[0].read_text(errors="replace"), self._outputs[1].read_text(errors="replace")

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._status(0) is None

    def _status(self, timeout: float) -> int | None:
        if self._ended is None:
            self._ended = self._server.ask(wait=self.pid, timeout=timeout)["status"]
        return self._ended

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to it and those that it has started."""
        os.killpg(self.pid, number)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Its end; a program that takes longer than `timeout` seconds is killed. Raises TimeoutExpired."""
        status = self._status(timeout)
        if status is None:
            self.kill()
            self._status(30)
            raise subprocess.TimeoutExpired(self.args, timeout, *self.output)
        return subprocess.CompletedProcess(self.args, status, *self.output)


def start(
    arguments: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | str | None = None, stderr: int | None = None
) -> Program:
    """Start a program, `-c CODE ...` or `-m MODULE ...`; `stderr` is None, or `subprocess.STDOUT`."""
    return _server().start(list(map(str, arguments)), dict(os.environ if env is None else env), str(cwd or Path.cwd()), stderr)


def run(arguments: Sequence[str], *, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; options are those of `start`."""
    return start(arguments, **options).wait(timeout)


class _Server:
    """The process that imports and forks."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="programs-")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.programs"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT
        )
        self._count = 0
        atexit.register(self._process.kill)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process that programs are forked from has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(self, arguments: list[str], env: dict[str, str], cwd: str, stderr: int | None) -> Program:
        self._count += 1
        out = Path(self.folder.name) / f"{self._count}.out"
        err = out if stderr == subprocess.STDOUT else out.with_suffix(".err")
        out.touch()
        err.touch()
        pid = self.ask(start=arguments, env=env, cwd=cwd, out=str(out), err=str(err))["pid"]
        return Program(self, pid, arguments, (out, err))


_started: list[_Server] = []


def _server() -> _Server:
    if not _started:
        _started.append(_Server())
    return _started[0]


def _wait(pid: int, timeout: float) -> int | None:
    """The status that a child has ended with; None where it has not within some seconds."""
    deadline, pause = time.monotonic() + timeout, 0.002
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(pause)
        pause = min(0.05, 1.5 * pause)


def _become(request: Mapping[str, Any]) -> None:
    """Make this process the program's, but for its code."""
    for number, path in ((1, request["out"]), (2, request["err"])):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])


def _serve() -> list[str]:
    """Fork a program for each request on stdin; returns in the forks, with what to run there."""
    import importlib

    for name in IMPORTED:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(json.dumps({"status": _wait(request["wait"], request["timeout"])}), file=answers, flush=True)
            continue
        pid = os.fork()
        os.setpgid(pid, pid)  # in both: whichever comes first
        if pid == 0:
            answers.close()
            _become(request)
            return list(request["start"])
        print(json.dumps({"pid": pid}), file=answers, flush=True)
    sys.exit(0)


if __name__ == "__main__":
    kind, what, *rest = _serve()
    sys.argv = [what if kind == "-m" else "-c", *rest]
    if kind == "-m":
        if not hasattr(sys.modules.get(what), "__path__"):  # else it is the package's __main__ that is run
            sys.modules.pop(what, None)
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})

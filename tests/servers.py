"""Real MLflow servers that tests start, kill and start again, on SQLite or PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from tests import programs
from tests.stores import new_store


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


SERVE = """
import sys
from mlflow.server.handlers import initialize_backend_stores
initialize_backend_stores(sys.argv[1], sys.argv[1], sys.argv[2])
import uvicorn
uvicorn.run("mlflow.server.fastapi_app:app", host="127.0.0.1", port=int(sys.argv[3]), log_level="warning")
"""


class Server:
    """What `mlflow server` runs, with its store and artifacts in a folder, at the same address each time it is started."""

    def __init__(self, folder: Path, store: str | None = None) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store = store or new_store(folder / "server.db", artifacts="mlflow-artifacts:/0")
        self._program: programs.Program | None = None

    def start(self) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        environment |= {  # as the command hands its options on to the server
            "_MLFLOW_SERVER_FILE_STORE": self.store, "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true", "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(self.folder / "artifacts"),
            "_MLFLOW_SGI_NAME": "uvicorn",
        }  # fmt: skip
        arguments = ["-c", SERVE, self.store, "mlflow-artifacts:/", str(self.port)]
        self._program = programs.start(arguments, env=environment, cwd=self.folder)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                assert self._program.running, self._program.output[1][-2000:]
                time.sleep(0.05)
        raise AssertionError("the server does not come up")

    def kill(self) -> None:
        if self._program is not None:
            with contextlib.suppress(ProcessLookupError):  # it may have died of something else
                self._program.kill()
            self._program.wait()
            self._program = None


class Postgres:
    """A PostgreSQL of its own, as the user postgres where this is root.

    Not in a folder of pytest's, which are for its own user alone, and made so again whenever another pytest starts.
    """

    def __init__(self) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not found:
            pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
        pytest.importorskip("psycopg2")
        self.bin, self.port = found[-1].parent, free_port()
        self.data = Path(tempfile.mkdtemp(prefix="postgres-"))
        self._as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self._as:
            shutil.chown(self.data, "postgres")
        self._run("initdb", "-D", str(self.data), "-A", "trust", "-U", "postgres", "-N")
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        self._run("pg_ctl", "-D", str(self.data), "-w", "-o", options, "-l", str(self.data / "log"), "start")
        self.uri = f"postgresql+psycopg2://postgres@127.0.0.1:{self.port}/postgres"

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as, str(self.bin / program), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120, cwd="/")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.data), "-m", "immediate", "stop")
        shutil.rmtree(self.data, ignore_errors=True)

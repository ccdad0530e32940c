"""MLflow UI and TensorBoard on the local store and `outputs/`, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

START_SECONDS = 60.0
HOST = "127.0.0.1"


def _free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) != 0


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/", timeout=2) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def start(logdir: Path, mlflow_port: int, tensorboard_port: int) -> list[subprocess.Popen[bytes]]:
    """Start both servers and wait until both answer. Raises ValueError for a taken port, RuntimeError when one ends."""
    for name, port in (("UI_PORT", mlflow_port), ("TENSORBOARD_PORT", tensorboard_port)):
        if not _free(port):
            raise ValueError(f"{name} is {port}, where something listens already; expected a free port (make ui {name}=...)")
    store = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    commands = [
        ["mlflow", "ui", "--backend-store-uri", store, "--host", HOST, "--port", str(mlflow_port)],
        ["tensorboard", "--logdir", str(logdir), "--host", HOST, "--port", str(tensorboard_port)],
    ]
    servers = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for command in (commands[0], ["tensorboard.main", *commands[1][1:]])
    ]
    deadline = time.monotonic() + START_SECONDS
    while not (_answers(mlflow_port) and _answers(tensorboard_port)):
        if any(server.poll() is not None for server in servers) or time.monotonic() > deadline:
            stop(servers)
            raise RuntimeError("a server ended at its start; run it alone to see why: " + " ".join(commands[0]))
        time.sleep(0.3)
    return servers


def stop(servers: list[subprocess.Popen[bytes]]) -> None:
    """End the servers and their workers."""
    for server in servers:
        try:
            os.killpg(server.pid, signal.SIGTERM)
        except ProcessLookupError:
            continue
    for server in servers:
        server.wait()


def _page(server: str) -> str:
    """The page to begin with: the newest shared view of a study, else the runs of the first experiment."""
    from mlflow import MlflowClient

    from mlflow_icr.tracking.mlflow.shared_view import newest_view

    newest = newest_view(MlflowClient(server))
    experiment, view = newest or ("0", "")
    shown = f"viewStateShareKey={view}&" if view else ""
    return f"#/experiments/{experiment}/runs?{shown}workflowType=machine_learning&compareRunsMode=CHART"


def newest_study(outputs: Path) -> Path:
    """The folder of the study that ended last; without one, the folder of all outputs."""
    studies = sorted(outputs.glob("*/study.png"), key=lambda path: path.stat().st_mtime)
    return studies[-1].parent if studies else outputs


def main() -> int:
    """Serve until interrupted; returns the exit status."""
    mlflow_port, tensorboard_port = int(os.environ.get("UI_PORT", "5000")), int(os.environ.get("TENSORBOARD_PORT", "6006"))
    if "MLFLOW_TRACKING_URI" not in os.environ and not Path("mlflow.db").exists():
        print("there is no mlflow.db here yet; run make demo first", file=sys.stderr)
        return 2
    try:
        servers = start(newest_study(Path("outputs")), mlflow_port, tensorboard_port)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell starts background jobs with it ignored
        signal.signal(number, signal.default_int_handler)
    print(f"MLflow       http://{HOST}:{mlflow_port}/{_page(f'http://{HOST}:{mlflow_port}')}")
    print(
        f"TensorBoard  http://{HOST}:{tensorboard_port}/?smoothing=0 (of all outputs: tensorboard --logdir outputs)", flush=True
    )
    try:
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        stop(servers)
    return 0


if __name__ == "__main__":
    sys.exit(main())

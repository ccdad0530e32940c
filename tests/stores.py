"""MLflow stores for tests: copies of one with its tables, which take MLflow seconds to make."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MAKE = "import sys, mlflow; mlflow.MlflowClient(sys.argv[1]).search_experiments()"


def empty_store() -> Path:
    """A database of this version of MLflow with nothing in it but the default experiment; made once, then kept."""
    path = ROOT / ".pytest_cache" / f"mlflow-{version('mlflow')}.db"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")  # several workers may begin at once
        subprocess.run([sys.executable, "-c", MAKE, f"sqlite:///{part}"], check=True, cwd=path.parent, capture_output=True)
        with closing(sqlite3.connect(part)) as connection:  # smaller, for it is copied for hundreds of tests
            connection.execute("PRAGMA page_size = 512")
            connection.execute("VACUUM")
        part.replace(path)
    return path


def new_store(path: Path, *, artifacts: str = "") -> str:
    """The address of a new store at a path; its default experiment's artifacts are beside it, or where `artifacts` says."""
    shutil.copy(empty_store(), path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA synchronous = OFF")
        place = artifacts or str(path.parent / "mlruns" / "0")
        connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0", (place,))
    return f"sqlite:///{path}"


def mlflow_state(folder: Path) -> dict[str, Any]:
    """What a run folder knows of MLflow: target, run, cursors, refusals."""
    found: dict[str, Any] = json.loads((folder / "mlflow.json").read_text())
    return found

"""Write a report, and upload it to its run."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlflow_icr.extraction.files import write_whole
from mlflow_icr.reporting.gather import gather_all, gather_folder
from mlflow_icr.reporting.material import RunMaterial
from mlflow_icr.reporting.page import page
from mlflow_icr.tracking import Tracker
from mlflow_icr.tracking.mlflow import store

logger = logging.getLogger(__name__)

FOLDER, NAME = "report", "index.html"  # in an output folder and among a run's artifacts


def write_report(
    runs: Sequence[RunMaterial | Path | str], path: Path | str, *, title: str = "", notes: Sequence[str] = ()
) -> Path:
    """Write the page on some runs, or output folders, as one HTML file, atomically; returns its path.

    Raises ValueError for no runs or a damaged history, FileNotFoundError for a folder without one, OSError.
    """
    if not runs:
        raise ValueError("runs is empty; expected at least one run to report on")
    materials = [run if isinstance(run, RunMaterial) else gather_folder(run) for run in runs]
    content = page(title or ", ".join(run.name for run in materials[:4]), materials, notes)
    path = Path(path)
    # Names from elsewhere may hold halves of characters, which no file can.
    write_whole(path, lambda file: file.write(content.encode("utf-8", "replace")))
    return path


def log_report(client: Any, run_id: str, path: Path) -> str:
    """Upload a written page as `report/index.html` of an MLflow run; returns the artifact's path. Raises StoreError."""
    store.get_run(client, run_id)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / NAME
        shutil.copyfile(path, copy)
        try:
            with store.answers():
                client.log_artifact(run_id, str(copy), FOLDER)
        except store.StoreError:
            raise
        except Exception as error:  # each artifact store brings its own library with its own errors
            raise store.StoreError(f"the artifact store does not take the report: {type(error).__name__}") from error
    return f"{FOLDER}/{NAME}"


def conclude(tracker: Tracker) -> Path | None:
    """Write the page of a tracker's folder at the end of its run, and give it to every sink; returns its path.

    The page repeats what is recorded already, so a failure is only a warning.
    """
    folder = tracker.journal.folder
    try:
        path = write_report([folder], folder / FOLDER / NAME)
    except Exception as error:  # of whatever kind
        logger.warning("the report was not written (%s); mlflow-icr report %s writes it", type(error).__name__, folder)
        logger.debug("the report failed", exc_info=error)
        return None
    tracker.artifact(path, FOLDER)
    if tracker.run_id is not None and tracker.experiment_id is not None:
        place = f"#/experiments/{tracker.experiment_id}/runs/{tracker.run_id}/artifacts/{FOLDER}/{NAME}"
        tracker.describe(f"[Report]({place}): curves, samples, audit and protocol on one page")
    return path


def report_command(targets: Sequence[str], output: Path, *, log: bool = False, echo: Callable[[str], None]) -> int:
    """Write the report on some targets (see `gather`) to a file, which is printed, and with `log` to their MLflow run.

    Returns the exit status; `echo` gets remarks, a line each. Raises ValueError for impossible targets or outputs, and
    OSError when a disk or store does not take it.
    """
    if output.is_dir():
        raise ValueError(f"output is {str(output)!r}, which is a folder; expected the name of a file, such as report.html")
    gathered = gather_all(targets)
    if log and gathered.run_id is None:
        raise ValueError(f"log is set, but {gathered.unlogged}")
    write_report(gathered.runs, output, title=gathered.title, notes=gathered.notes)
    for note in gathered.notes:
        echo(note)
    without = [run.name for run in gathered.runs if not run.measured]
    if without:
        echo(f"without a measurement of ICR: {', '.join(without)}")
    print(output)
    if log and gathered.run_id is not None:
        echo(f"logged as {log_report(store.connect(), gathered.run_id, output)} of run {gathered.run_id}")
    return 0

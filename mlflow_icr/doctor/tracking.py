"""Whether MLflow's tracking store and artifact store answer and accept results, and MLflow finds the plugins."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mlflow_icr.doctor.check import BAD, OK, Check, first_line

EXPERIMENT = "mlflow-icr doctor"
STORE, ARTIFACTS = "tracking store", "artifact store"
GROUPS = ("mlflow.model_evaluator", "mlflow.run_context_provider", "mlflow.dataset_constructor")
CONTENT = "written by mlflow-icr doctor"


def tracking() -> Iterator[Check]:
    """Write a run with a metric, a tag and an artifact to a new experiment, read them, and delete the experiment."""
    import mlflow

    from mlflow_icr.tracking.mlflow.store import StoreError, answers, connect, without_credentials

    uri = mlflow.get_tracking_uri()
    shown = without_credentials(uri, uri)
    file = _sqlite_file(uri)
    if file is not None and not file.exists():
        yield _new_file(file, shown)
        return
    server = uri.startswith(("http://", "https://"))
    mend = f"start it (mlflow server), or set MLFLOW_TRACKING_URI; it is {shown}"
    try:
        client = connect()
        with answers():
            client.search_experiments(max_results=1)
    except StoreError as error:
        yield Check(STORE, BAD, str(error), mend if server else "set MLFLOW_TRACKING_URI to a store that this MLflow reads")
        return
    yield Check(STORE, OK, f"{shown} answers")
    created: list[tuple[str, list[Path]]] = []
    try:
        with answers():
            yield from _write(client, created)
    except StoreError as error:
        yield Check(f"{STORE}, writing", BAD, str(error), "ask for the right to write there, or name another store")
    finally:
        for experiment, folders in created:
            _delete_experiment(client, experiment, folders)


def _sqlite_file(uri: str) -> Path | None:
    parts = urlsplit(uri)
    return Path(unquote(parts.path[1:])) if parts.scheme == "sqlite" and parts.path[1:] else None


def _new_file(file: Path, shown: str) -> Check:
    """The check of a store that does not exist yet; connecting to it would make it."""
    folder = file.resolve().parent
    if os.access(folder, os.W_OK):
        return Check(STORE, OK, f"{shown} is not there yet; the first run makes it")
    return Check(STORE, BAD, f"{shown} is not there, and {folder} cannot be written", "name another with MLFLOW_TRACKING_URI")


def _write(client: Any, created: list[tuple[str, list[Path]]]) -> Iterator[Check]:
    from mlflow.entities import Metric, RunTag

    # A unique name: other processes may run this check, and a deleted experiment's name stays taken.
    experiment = client.create_experiment(f"{EXPERIMENT} {uuid.uuid4().hex}")
    created.append((experiment, _new_folders(client.get_experiment(experiment).artifact_location)))
    run = client.create_run(experiment, tags={"role": "doctor"})
    run_id = run.info.run_id
    client.log_batch(run_id, metrics=[Metric("doctor", 0.1, 0, 1)], tags=[RunTag("doctor", "here")])
    history = [(point.step, point.value) for point in client.get_metric_history(run_id, "doctor")]
    if history != [(1, 0.1)]:
        yield Check(f"{STORE}, writing", BAD, f"a metric (1, 0.1) comes back as {history}", "look at the store's own log")
    else:
        yield Check(f"{STORE}, writing", OK, "takes a run and gives it back")
    yield _artifact(client, run)


def _artifact(client: Any, run: Any) -> Check:
    run_id = run.info.run_id
    mend = "its address is the server's --artifacts-destination or --default-artifact-root; this machine needs access to it"
    try:
        client.log_text(run_id, CONTENT, "doctor.txt")
        from mlflow.artifacts import load_text

        returned = load_text(f"{run.info.artifact_uri}/doctor.txt")
    except Exception as error:  # each artifact store brings its own library with its own errors
        from mlflow_icr.tracking.mlflow.store import without_credentials

        return Check(ARTIFACTS, BAD, without_credentials(first_line(error)), mend)
    if returned != CONTENT:
        return Check(ARTIFACTS, BAD, "a file comes back with another content", mend)
    return Check(ARTIFACTS, OK, "takes a file and gives it back")


def _new_folders(place: str) -> list[Path]:
    """The folders of a local artifact store that an experiment's first file will make, the innermost first."""
    if urlsplit(place).scheme not in ("", "file"):
        return []
    folder = Path(unquote(urlsplit(place).path)).absolute()
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _delete_experiment(client: Any, experiment: str, folders: list[Path]) -> None:
    """Delete the doctor's experiment: permanently if this process is the store, else as far as a server allows."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with contextlib.suppress(Exception):  # not part of the check: some stores do not allow it
        runs = client.search_runs([experiment])
        for run in runs:
            with contextlib.suppress(Exception):
                get_artifact_repository(run.info.artifact_uri).delete_artifacts()
            client.delete_run(run.info.run_id)
        client.delete_experiment(experiment)
        store = client._tracking_client.store
        if hasattr(store, "_hard_delete_experiment"):
            for run in runs:
                store._hard_delete_run(run.info.run_id)
            store._hard_delete_experiment(experiment)
    if folders:
        shutil.rmtree(folders[0], ignore_errors=True)
    with contextlib.suppress(OSError):  # another process has put files into it
        for folder in folders[1:]:
            folder.rmdir()


def plugins() -> Iterator[Check]:
    """Whether the entry points are installed, and MLflow has loaded their objects."""
    mend = "pip install mlflow-icr (or pip install -e .) in the environment that MLflow runs in"
    for group in GROUPS:
        points = [point for point in entry_points(group=group) if point.value.startswith("mlflow_icr.")]
        if not points:
            yield Check(group, BAD, "no entry point of mlflow-icr is installed", mend)
            continue
        missing = [point.name for point in points if not _loaded(group, point)]
        names = ", ".join(point.name for point in points)
        if missing:
            yield Check(group, BAD, f"MLflow has not loaded {', '.join(missing)}", f"import its module to see why; {mend}")
        else:
            yield Check(group, OK, f"{names}, loaded by MLflow")


def _loaded(group: str, point: Any) -> bool:
    """Whether MLflow itself has loaded the object of an entry point."""
    import mlflow

    if group == "mlflow.model_evaluator":
        from mlflow.models import list_evaluators

        return point.name in list_evaluators()
    if group == "mlflow.run_context_provider":
        from mlflow.tracking.context import registry

        kind = point.load()
        return any(isinstance(provider, kind) for provider in registry._run_context_provider_registry)
    return hasattr(mlflow.data, point.name)

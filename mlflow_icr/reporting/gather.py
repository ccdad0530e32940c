"""Collect the material of a report from output folders, MLflow runs and experiments."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mlflow_icr.bridge.run_export import STEPPED
from mlflow_icr.monitoring.series import HISTORY, read_arrays, read_distributions, read_history
from mlflow_icr.reporting.material import MEASURED, TELLING, RunMaterial, finite_rows
from mlflow_icr.tracking.event_log import read_operations
from mlflow_icr.tracking.mlflow import store
from mlflow_icr.tracking.operations import End, Params, Tags

MOST_RUNS = 50  # of a folder or an experiment, where each costs a request for every metric
EIGENVALUES = "repr/eigenvalues"
STUDY, STUDY_NAME = "study", "study_name"  # tags: of a study's members, and of its own run


@dataclass(frozen=True)
class Gathered:
    """The runs of a report, its title, the MLflow run that it belongs to (None: `unlogged` says why), and remarks."""

    title: str
    runs: tuple[RunMaterial, ...]
    run_id: str | None = None
    unlogged: str = ""
    notes: tuple[str, ...] = ()


def _texts(content: object) -> dict[str, str]:
    return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}


def _flat_texts(content: object) -> dict[str, str]:
    """Entries of groups by flat name, with those outside of groups."""
    texts: dict[str, str] = {}
    for key, value in content.items() if isinstance(content, dict) else ():
        texts |= _texts(value) if isinstance(value, dict) else {str(key): str(value)}
    return texts


def _described(folder: Path) -> tuple[str, dict[str, str], dict[str, str], str]:
    """Name, parameters, tags and status of a folder's run."""
    name, status = str(_state(folder).get("target", {}).get("run_name") or folder.resolve().name), ""
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    for operation in read_operations(folder):
        match operation:
            case Params(values=values):
                params = _texts(values) | params  # a parameter of a run keeps its first value
                status = ""
            case Tags(values=values):
                tags |= _texts(values)
            case End():
                status = operation.status
    if not params and (folder / "config.yaml").exists():
        try:
            params = _flat_texts(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        except yaml.YAMLError:
            params = {}
    return str(name), params, tags, status


def _folder_eigenvalues(folder: Path, step: int) -> Any:
    return read_distributions(folder, step)[EIGENVALUES]


def _folder_thumbnails(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as stored:
        return np.asarray(stored["images"])


def gather_folder(folder: Path | str, name: str = "") -> RunMaterial:
    """An output folder's run. Raises FileNotFoundError where it has no history, ValueError for a damaged one."""
    folder = Path(folder)
    rows, left_out = finite_rows(read_history(folder))
    recorded_name, params, tags, status = _described(folder)
    pictures: dict[str, dict[int, Callable[[], bytes]]] = {}
    for path in sorted((folder / "images").rglob("*.png")):
        if path.stem.isdigit():
            key = path.parent.relative_to(folder / "images").as_posix()
            pictures.setdefault(key, {})[int(path.stem)] = path.read_bytes
    figures = {path.stem: path.read_bytes for path in sorted((folder / "figures").glob("*.png"))}
    steps = sorted(int(path.stem) for path in (folder / "distributions").glob("*.npz") if path.stem.isdigit())
    eigenvalues = {step: partial(_folder_eigenvalues, folder, step) for step in steps}
    numbered = sorted(int(path.stem) for path in (folder / "probe").glob("*.npz") if path.stem.isdigit())
    probe = {step: partial(read_arrays, folder, step) for step in numbered}
    thumbnails = folder / "embeddings" / "s.npz"
    return RunMaterial(
        name or recorded_name, str(folder), rows, params, tags, pictures, figures, eigenvalues, status, left_out, probe,
        partial(_folder_thumbnails, thumbnails) if thumbnails.is_file() else None,
    )  # fmt: skip


def run_of_folder(folder: Path) -> str | None:
    """The MLflow run of an output folder, once it is known."""
    return str(_state(folder).get("run_id") or "") or None


def _state(folder: Path) -> dict[str, Any]:
    """The folder's record of its run in MLflow; empty if it is damaged or missing."""
    try:
        state = json.loads((folder / "mlflow.json").read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _download(client: Any, run_id: str, path: str) -> bytes:
    with tempfile.TemporaryDirectory() as temporary:
        return store.download(client, run_id, path, Path(temporary))


def _points(client: Any, run_id: str, key: str) -> Iterator[Any]:
    count, more_follow = 0, True
    while more_follow:
        page, more_follow = store.metric_page(client, run_id, key, count)
        count += len(page)
        yield from page


def gather_run(client: Any, run: Any) -> RunMaterial:
    """An MLflow run, by its metrics and artifacts. Raises StoreError when the store does not answer."""
    run_id = run.info.run_id
    by_step: dict[int, dict[str, float]] = {}
    for key in filter(MEASURED.match, sorted(run.data.metrics)):
        # The store's order is by time: the newest of equal steps is the last, and stays.
        for point in _points(client, run_id, key):
            by_step.setdefault(point.step, {"images_seen": point.step})[key] = point.value
    measured = [row for row in by_step.values() if any(TELLING.match(key) for key in row)]
    rows, left_out = finite_rows(measured)
    pictures: dict[str, dict[int, Callable[[], bytes]]] = {}
    figures: dict[str, Callable[[], bytes]] = {}
    for path in _picture_paths(client, run_id) if rows else []:
        stepped = STEPPED.fullmatch(path)
        reader = partial(_download, client, run_id, path)
        if stepped:
            pictures.setdefault(re.sub("[~#]", "/", stepped["key"]), {})[int(stepped["step"])] = reader
        else:
            figures[Path(path).stem] = reader
    info, data = run.info, run.data
    return RunMaterial(
        info.run_name or run_id, run_id, rows, dict(data.params), dict(data.tags), pictures, figures,
        status=info.status, left_out=left_out,
    )  # fmt: skip


def _picture_paths(client: Any, run_id: str) -> list[str]:
    """Pictures among the artifacts, as they are named; none where the artifact store does not answer: numbers come first."""
    try:
        paths = [file.path for folder in ("images", "figures") for file in store.files(client, run_id, folder)]
    except store.StoreError:
        return []
    return [path for path in paths if path.lower().endswith(".png")]


def _of_folder(folder: Path) -> Gathered:
    unlogged = f"{str(folder)!r} belongs to no MLflow run that is known (mlflow.json)"
    run_id = run_of_folder(folder)
    if (folder / HISTORY).exists():
        run = gather_folder(folder)
        return Gathered(run.name, (run,), run_id, unlogged)
    below = sorted(path.parent for path in folder.rglob(HISTORY))
    if not below:
        raise ValueError(f"folder is {str(folder)!r}, which holds no {HISTORY}; expected the output folder of a run or study")
    runs = tuple(gather_folder(path) for path in below[:MOST_RUNS])
    return Gathered(folder.resolve().name, runs, run_id, unlogged, _left_out(len(below), "first"))


def _in_order(runs: Sequence[Any]) -> list[Any]:
    """Runs in the order of `mlflow.search_runs`, newest first, each followed by the runs nested in it."""
    newest = sorted(runs, key=lambda run: (-(run.info.start_time or 0), run.info.run_id))
    ids = {run.info.run_id for run in runs}
    children: dict[str, list[Any]] = {}
    for run in newest:
        parent = run.data.tags.get(store.PARENT_TAG, "")
        children.setdefault(parent if parent in ids and parent != run.info.run_id else "", []).append(run)
    ordered: list[Any] = []

    def add(run: Any) -> None:
        ordered.append(run)
        for child in children.get(run.info.run_id, []):
            add(child)

    for run in children.get("", []):
        add(run)
    return ordered


def _of_run(client: Any, run: Any) -> Gathered:
    """A run with those nested in it; for a study's own run, the runs of the study."""
    name = run.info.run_name or run.info.run_id
    members = list(store.family(client, run.info.run_id))
    study = run.data.tags.get(STUDY_NAME)
    if study:
        member_ids = {member.info.run_id for member in members}
        others = store.runs(client, run.info.experiment_id)
        members += [other for other in others if other.data.tags.get(STUDY) == study and other.info.run_id not in member_ids]
        # The study's own run has no curves; it is what the page is about.
        members = [member for member in members if member.info.run_id != run.info.run_id] or members
    return _many(client, name, members, run.info.run_id)


def _of_experiment(client: Any, experiment: str, name: str) -> Gathered:
    members = list(store.runs(client, experiment))
    if not members:
        raise ValueError(f"experiment is {name!r}, which has no runs")
    studies = [run for run in members if STUDY_NAME in run.data.tags]
    parents = {run.data.tags.get(store.PARENT_TAG) for run in members}
    owners = studies or [run for run in members if run.info.run_id in parents] or members
    run_id = owners[0].info.run_id if len(owners) == 1 else None
    why = f"experiment {name!r} has no single study or parent run that a page of all its runs belongs to; name a run instead"
    gathered = _many(client, name, members, run_id)
    return Gathered(gathered.title, gathered.runs, run_id, why, gathered.notes)


def _many(client: Any, title: str, members: Sequence[Any], run_id: str | None) -> Gathered:
    ordered = _in_order(members)
    shown = ordered[:MOST_RUNS]
    runs = tuple(gather_run(client, run) for run in shown)
    return Gathered(title, runs, run_id, notes=_left_out(len(ordered), "newest"))


def _left_out(count: int, which: str) -> tuple[str, ...]:
    """A remark if there are more runs than a page takes."""
    if count <= MOST_RUNS:
        return ()
    return (f"This page has the {which} {MOST_RUNS} of {count} runs; name others for a page of theirs.",)


def gather(target: str) -> Gathered:
    """The runs of a name: an output folder, or one above several; a run's id; an experiment's name or id.

    Raises ValueError for what is none of them, StoreError when the tracking store does not answer.
    """
    folder = Path(target)
    if folder.is_dir() and next(folder.rglob(HISTORY), None) is not None:
        return _of_folder(folder)
    client = store.connect()
    with store.answers():
        named = client.get_experiment_by_name(target)
    if named is not None:
        return _of_experiment(client, named.experiment_id, named.name)
    if target.isdigit():
        from mlflow.exceptions import MlflowException

        with store.answers():
            try:
                experiment = client.get_experiment(target)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                experiment = None
        if experiment is not None:
            return _of_experiment(client, experiment.experiment_id, experiment.name)
    if re.fullmatch(r"[0-9a-fA-F]{32}", target):
        return _of_run(client, store.get_run(client, target))
    raise ValueError(
        f"target is {target!r}, which is no folder with a {HISTORY}, and no run's id (32 hexadecimal digits), experiment's "
        "name or experiment's id that the tracking store has"
    )


def gather_all(targets: Sequence[str]) -> Gathered:
    """Several targets as one page, in the order given. Raises ValueError as `gather` does."""
    parts = [gather(target) for target in targets]
    if len(parts) == 1:
        return parts[0]
    title = " and ".join(part.title for part in parts)
    notes = tuple(note for part in parts for note in part.notes)
    why = f"a page of {len(parts)} targets belongs to no single run; expected one"
    return Gathered(title, tuple(run for part in parts for run in part.runs), None, why, notes)

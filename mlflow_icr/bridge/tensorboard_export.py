"""MLflow runs as TensorBoard event files: an experiment or chosen runs, once or as long as they run."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow_icr.bridge.run_export import Echo, Exported, Looked, RunExport, owner
from mlflow_icr.tracking.folder import check_writable
from mlflow_icr.tracking.mlflow import store


def folder_name(run: Any, digits: int = 8) -> str:
    """A run's folder: its name made safe, and the first digits of its id."""
    name = re.sub(r"[^\w.-]+", "_", run.info.run_name or "run").strip("._-")[:60]
    return f"{name or 'run'}-{run.info.run_id[:digits]}"


class Exporter:
    """Exports runs into a logdir; remembers where each one goes.

    Raises ValueError when the logdir cannot be written.
    """

    def __init__(self, logdir: Path | str, client: Any = None, echo: Echo = lambda text: None) -> None:
        self.logdir = Path(logdir)
        check_writable("logdir", self.logdir)
        self.client = client if client is not None else store.connect()
        self.echo = self._once(echo)
        self._folders: dict[str, Path] = {}
        self._looked: dict[str, Looked] = {}

    @staticmethod
    def _once(echo: Echo) -> Echo:
        printed: set[str] = set()

        def echo_once(text: str) -> None:
            if text not in printed:
                printed.add(text)
                echo(text)

        return echo_once

    def run(self, run: Any) -> Exported:
        """Bring the folder of a run (MLflow's Run) up to the store."""
        folder = self._folder(run, ())
        group = folder.relative_to(self.logdir).as_posix()
        looked = self._looked.setdefault(run.info.run_id, Looked())
        return RunExport(self.client, run, folder, group, self.echo, looked)()

    def _folder(self, run: Any, below: Sequence[str]) -> Path:
        """A run's folder, inside its parent's, whichever of the two is exported first."""
        run_id: str = run.info.run_id
        if run_id not in self._folders:
            parent_id = run.data.tags.get(store.PARENT_TAG)
            parent = self.logdir
            if parent_id and parent_id not in (run_id, *below):
                try:
                    parent = self._folders.get(parent_id) or self._folder(
                        store.get_run(self.client, parent_id), (*below, run_id)
                    )
                except ValueError:  # deleted for good
                    parent = self.logdir
            self._folders[run_id] = self._place(parent, run)
        return self._folders[run_id]

    @staticmethod
    def _place(parent: Path, run: Any) -> Path:
        """The folder that a run was exported to before, perhaps under another name; else a new folder."""
        for folder in sorted(parent.glob(f"*-{run.info.run_id[:8]}*")):
            if owner(folder) == run.info.run_id:
                return folder
        short = parent / folder_name(run)
        return short if owner(short) in (None, run.info.run_id) else parent / folder_name(run, 32)


def _selection(client: Any, experiment: str | None, run_ids: Sequence[str]) -> Callable[[], Iterator[Any]]:
    """A function that lists the chosen runs again at each call. Raises ValueError for an unknown experiment or run."""
    if experiment is not None:
        experiment_id = store.experiment_id(client, experiment)
        return lambda: store.runs(client, experiment_id)
    for run_id in run_ids:
        store.get_run(client, run_id)
    return lambda: (run for run_id in run_ids for run in store.family(client, run_id))


def export_runs(
    logdir: Path | str,
    *,
    experiment: str | None = None,
    run_ids: Sequence[str] = (),
    follow: bool = False,
    interval: float = 5.0,
    stop: threading.Event | None = None,
    client: Any = None,
    on_run: Callable[[Exported], object] = lambda exported: None,
    echo: Echo = lambda text: None,
) -> list[Exported]:
    """Export an experiment by its name, or runs with those nested in them; returns what each run got.

    With `follow`, the export is repeated every `interval` seconds until no run is running; it takes up new runs and waits for a
    store that does not answer for a while. `stop` ends it between two looks. `on_run` is called after each look, `echo` with
    lines on what is left out. Raises ValueError for an unknown experiment or run and an unwritable logdir, store.StoreError (an
    OSError) when the store does not answer at the start.
    """
    if (experiment is None) == (not run_ids):
        raise ValueError(f"experiment is {experiment!r} and run_ids {list(run_ids)!r}; expected one of the two")
    if not interval > 0:
        raise ValueError(f"interval is {interval}; expected seconds above 0")
    exporter = Exporter(logdir, client, echo)
    select = _selection(exporter.client, experiment, run_ids)
    known: dict[str, Exported] = {}
    running = _look(exporter, select, known, on_run)
    stop = stop or threading.Event()
    while follow and running and not stop.wait(interval):
        try:
            running = _look(exporter, select, known, on_run)
        except store.StoreError as error:
            exporter.echo(f"{error}; waiting for it")
    return list(known.values())


def _look(
    exporter: Exporter,
    select: Callable[[], Iterator[Any]],
    known: dict[str, Exported],
    on_run: Callable[[Exported], object],
) -> bool:
    """Export every run that had not ended when it was last exported; returns whether some run is running."""
    running = False
    for run in select():
        running |= run.info.status not in store.ENDED
        before = known.get(run.info.run_id)
        if before and before.status in store.ENDED:
            continue
        # The status was read before the history: of an ended run, everything has been seen.
        exported = exporter.run(run)
        on_run(exported)
        if before:
            points, images = before.new_points + exported.new_points, before.new_images + exported.new_images
            exported = replace(exported, new_points=points, new_images=images)
        known[run.info.run_id] = exported
    return running

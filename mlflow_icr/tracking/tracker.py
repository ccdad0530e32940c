"""One report, written once, to the journal and from there to every sink."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from mlflow_icr.monitoring.report import Report
from mlflow_icr.monitoring.summary import summarise
from mlflow_icr.monitoring.verdict import Verdict, verdict
from mlflow_icr.tracking.background import Background
from mlflow_icr.tracking.checkpoints.folder import checkpoints
from mlflow_icr.tracking.journal import Journal
from mlflow_icr.tracking.logged import FOLDER, VALUES, Logged, LoggedValues

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """A place that results go to: it shows what it is given, and never changes a value."""

    name: str

    def bind(self, folder: Path) -> None:
        """Hear, before all else, of the output folder whose results these are."""

    def open(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Get ready, with the run's parameters and tags."""

    def dataset(self, description: Mapping[str, str], context: str) -> None:
        """Show what a set of images is: MLflow's name, digest, source, source_type, schema and profile, as text."""

    def recorded(self) -> Mapping[int, Collection[str]]:
        """Keys of values, pictures and distributions that are there already, by images seen."""

    def write(self, report: Report) -> None:
        """Add a measurement."""

    def log(self, rows: Sequence[Logged]) -> None:
        """Add values that a training logs of its own; what fails is handed over again."""

    def summary(self, values: Mapping[str, float], step: int) -> None:
        """Set the summary metrics of the run."""

    def verdict(self, verdict: Verdict, step: int) -> None:
        """Show what the history says so far."""

    def table(self, name: str, rows: Sequence[Mapping[str, object]], step: int) -> None:
        """Show a table; all rows have the same keys."""

    def figure(self, name: str, picture: np.ndarray, step: int) -> None:
        """Show a figure (H, W, 3) uint8 of the whole run up to a step."""

    def embedding(self, name: str, vectors: np.ndarray, images: np.ndarray, labels: Sequence[str], step: int) -> None:
        """Show vectors (N, D) with their images (N, H, W, 3) uint8 and texts, where the place can."""

    def artifact(self, path: str, folder: str | None = None) -> None:
        """Keep a file of the output folder as it is, in a folder of its own, where the place keeps files."""

    def checkpoint(self, folder: Path, row: Mapping[str, float], found: Verdict, *, kept: bool = False) -> None:
        """Take a checkpoint with its measurement's row, where the place can, once; `kept`: the run ends, and keeps it."""

    def close(self, status: str) -> None:
        """Finish: FINISHED, FAILED or KILLED."""


class Tracker:
    """Journal first, then the sinks, none of which can stop a training: each failure is told once and the rest goes on.

    Opening brings every sink up to the journal, so that a resumed run shows what an interrupted one had measured. What can be
    told again from the folder, a measurement above all, is told in a thread, and the training goes on. Everything else comes
    after it, in the caller's time. Use a tracker from one thread. Where the disk does not take a note of what was told there,
    the next call that hands something to the thread (`record`, `log`, `checkpoint`), or `settle`, raises OSError.
    """

    def __init__(self, output_dir: Path | str, sinks: Sequence[Sink]) -> None:
        self.journal = Journal(output_dir)
        self.sinks = list(sinks)
        self._told: set[str] = set()
        self._logged: LoggedValues | None = None  # most runs have none
        self._found: tuple[int, Verdict] | None = None  # of so many rows
        self._finding = threading.Lock()  # whoever comes second has what the first one finds
        self._background = Background("mlflow-icr tracker")

    def open(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Open every sink and write to it what the journal has and it has not."""
        for sink in self.sinks:
            self._guard(sink, partial(self._open, sink, params, tags))
        if (self.journal.folder / FOLDER / VALUES).exists():
            self._values().flush()

    def dataset(self, describe: Callable[[], Mapping[str, str]], context: str) -> None:
        """Show in every sink what a set of images is; `context` is what it is for, "training" or "validation".

        `describe` gives the set's `ImageDataset.to_dict()`; it is called where its failure, too, costs no more than a warning.
        """
        self._tell(lambda sink: sink.dataset(describe(), context))

    def _open(self, sink: Sink, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        sink.bind(self.journal.folder)
        sink.open(params, tags)
        self.replay(sink)

    def replay(self, sink: Sink) -> None:
        """Write to a sink what the folder has and it has not, also of a measurement that was cut off in the middle."""
        if not self.journal.rows:
            return
        there = sink.recorded()
        for row in self.journal.rows:
            step = int(row["images_seen"])
            missing = self.journal.report(row).without(there.get(step, ()))
            if missing.values or missing.figures or missing.distributions:
                sink.write(missing)
        self._offer(sink, checkpoints(self.journal.folder))

    def _offer(self, sink: Sink, folders: Mapping[int, Path], *, kept: bool = False) -> None:
        rows = {int(row["images_seen"]): row for row in self.journal.rows}
        measured = {step: folder for step, folder in folders.items() if step in rows}
        found = self.verdict if measured else None
        for step, folder in measured.items():
            assert found is not None
            sink.checkpoint(folder, rows[step], found, kept=kept)

    def keep(self, sink: Sink) -> None:
        """Show in a sink the checkpoints that a run keeps at its end, the newest and that of its verdict."""
        kept = {max(self.journal.steps, default=0), self.verdict.checkpoint_images_seen}
        folders = {step: folder for step, folder in checkpoints(self.journal.folder).items() if step in kept}
        self._offer(sink, folders, kept=True)

    def checkpoint(self, images_seen: int) -> None:
        """Show in every sink the checkpoint at a measurement; nothing where there is none, or nothing was measured."""
        folders = {step: folder for step, folder in checkpoints(self.journal.folder).items() if step == images_seen}
        self._background.later(lambda: self._each(lambda sink: self._offer(sink, folders)))

    def record(self, report: Report) -> None:
        """Write a measurement to the journal, then everywhere; one that the journal has is not written again.

        Raises OSError when the journal cannot be written: only there would a value be lost.
        """
        if report.step in self.journal.steps:
            return
        for key, why in report.absent.items():
            if key not in self._told:
                self._told.add(key)
                logger.warning("%s is not measured: %s", key, why)
        for key, text in report.warnings.items():
            if f"warning {key}" not in self._told:
                self._told.add(f"warning {key}")
                logger.warning("%s is %s", key, text)
        self.journal.append(report)
        self._background.later(partial(self._show, report, len(self.journal.rows)))

    def _show(self, report: Report, count: int) -> None:
        self._each(lambda sink: sink.write(report))
        found = self._verdict_of(count)
        self._each(lambda sink: sink.verdict(found, report.step))

    def log(self, row: Logged) -> None:
        """Write a training's own values to `logged/values.jsonl`, and within seconds everywhere; OSError when the disk is full.

        They are apart from the journal: its rows are measurements, one for each number of images seen.
        """
        values = self._values()
        if values.add(row):
            self._background.later(values.flush)

    def _values(self) -> LoggedValues:
        if self._logged is None:
            self._logged = LoggedValues(self.journal.folder, [sink.name for sink in self.sinks], self._send_logged)
        return self._logged

    def _send_logged(self, name: str, rows: list[Logged]) -> bool:
        return all(self._guard(sink, partial(sink.log, rows)) for sink in self.sinks if sink.name == name)

    def show(self, report: Report) -> None:
        """Write a report to every sink, but not to the journal: it is no measurement, and the caller keeps what is in it."""
        self._tell(lambda sink: sink.write(report))

    def table(self, name: str, rows: Sequence[Mapping[str, object]], step: int) -> None:
        """Write a table to `tables/<name>.csv` in the folder and to every sink; nothing for no rows."""
        if not rows:
            return
        self.journal.write_table(name, rows)
        self._tell(lambda sink: sink.table(name, rows, step))

    def figure(self, name: str, picture: np.ndarray, step: int) -> None:
        """Write a figure (H, W, 3) uint8 of the whole run to `figures/<name>.png` in the folder and to every sink."""
        self.journal.write_figure(name, picture)
        self._tell(lambda sink: sink.figure(name, picture, step))

    def embedding(self, name: str, vectors: np.ndarray, images: np.ndarray, labels: Sequence[str], step: int) -> None:
        """Show vectors (N, D) with thumbnails (N, H, W, 3) uint8 in every sink that can."""
        self._tell(lambda sink: sink.embedding(name, vectors, images, labels, step))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Hand a file of the output folder to every sink that keeps files, for its folder of that name."""
        self._tell(lambda sink: sink.artifact(str(path), folder))

    @property
    def verdict(self) -> Verdict:
        """What the history says so far; computed once for each row, of which there are only ever more."""
        return self._verdict_of(len(self.journal.rows))

    def _verdict_of(self, count: int) -> Verdict:
        with self._finding:
            if self._found is None or self._found[0] != count:
                self._found = (count, verdict(self.journal.rows[:count]))
            return self._found[1]

    def settle(self) -> None:
        """Wait until every sink has been told everything. Raises what writing a training's own values has raised."""
        self._background.settle()

    def close(self, status: str) -> dict[str, float]:
        """Write the summary of the history, which is returned, and close every sink with the run's status.

        Raises OSError when a training's own values cannot be written.
        """
        self._background.now(lambda: None)  # a flush that failed is repeated here
        self._background.stop()
        try:
            if self._logged is not None:
                self._logged.close()
                self._logged = None
        finally:  # a full disk must not keep the sinks from hearing of the end
            values = summarise(self.journal.rows) | self.verdict.summary()
            step = max(self.journal.steps, default=0)
            if values:
                self._each(lambda sink: sink.summary(values, step))
            self._each(self.keep)
            self._each(lambda sink: sink.close(status))
        return values

    def _tell(self, call: Callable[[Sink], None]) -> None:
        """Make a call for every sink, when all earlier ones have been made."""
        self._background.now(lambda: self._each(call))

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in self.sinks:
            self._guard(sink, partial(call, sink))

    def _guard(self, sink: Sink, call: Callable[[], None]) -> bool:
        """Whether the call went through."""
        try:
            call()
        except Exception as error:  # a tracker of any kind, failing in any way, must not cost a training run
            if sink.name not in self._told:
                self._told.add(sink.name)
                # The type only: a tracking URI, which may hold a password, can be part of the message.
                logger.warning(
                    "%s does not take results (%s); training goes on, and everything measured is in %s",
                    sink.name,
                    type(error).__name__,
                    self.journal.path,
                )
            logger.debug("%s failed", sink.name, exc_info=error)
            return False
        return True

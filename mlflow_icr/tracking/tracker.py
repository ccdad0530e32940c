"""The tracker: it writes a report to the journal, then to the event log, from which threads deliver it to every sink."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mlflow_icr.monitoring.report import Report
from mlflow_icr.monitoring.summary import summarise
from mlflow_icr.monitoring.verdict import Verdict, folded
from mlflow_icr.tracking import operations as ops
from mlflow_icr.tracking.checkpoints.folder import checkpoints
from mlflow_icr.tracking.ending import end_at_exit, exit_on_signals, status_of
from mlflow_icr.tracking.event_log import EventLog
from mlflow_icr.tracking.folder import check_writable, holds_run
from mlflow_icr.tracking.journal import Journal, text_operations
from mlflow_icr.tracking.lock import Lock
from mlflow_icr.tracking.logged import Logged
from mlflow_icr.tracking.operations import now_ms
from mlflow_icr.tracking.reactions import Listener, Reaction
from mlflow_icr.tracking.sink import Sink, SinkState, echo_on_stderr, not_taken
from mlflow_icr.tracking.worker import LAST_ATTEMPTS, Worker, drain

logger = logging.getLogger(__name__)

LOCK = ".tracker.lock"
NOTE = "mlflow.note.content"  # the description that a run's page shows
NEVER, ALLOW, MUST = "never", "allow", "must"
ONLINE, OFFLINE, DISABLED = "online", "offline", "disabled"
RESUMES, MODES, MODE_VARIABLE = (NEVER, ALLOW, MUST), (ONLINE, OFFLINE, DISABLED), "MLFLOW_ICR_MODE"


class Tracker:
    """Writes to the journal, then to the event log, and from there to sinks, which cannot stop a training or make it wait.

    Use it as a context: the run ends as FINISHED, as FAILED by an exception, as KILLED by a signal or an exit. Without one it
    ends with `close`, or as FAILED or KILLED with the program. `resume` is for a folder that holds a run: "never" refuses it,
    "allow" continues it, "must" refuses a folder without one. `mode` (or MLFLOW_ICR_MODE, or "online"): "offline" sends
    nothing to remote sinks, which `mlflow-icr sync` does later; "disabled" sends nothing to any sink.
    `on_verdict`, a function, a shell command or a webhook's URL, gets each change of the verdict's state, as a `VerdictChange`.
    One process uses a folder at a time, and one thread a tracker; a forked or spawned worker's calls do nothing.
    Raises ValueError for a folder that is refused, in use or damaged.
    """

    def __init__(
        self,
        output_dir: Path | str,
        sinks: Sequence[Sink],
        *,
        resume: str = NEVER,
        mode: str | None = None,
        on_verdict: Listener | str | None = None,
    ) -> None:
        self.mode = mode or os.environ.get(MODE_VARIABLE) or ONLINE
        for name, value, allowed in (("resume", resume, RESUMES), ("mode", self.mode, MODES)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
        folder = Path(output_dir).absolute()  # also after os.chdir
        if resume == NEVER and holds_run(folder):
            raise ValueError(f"output_dir is {str(output_dir)!r}, which holds a run; expected a new folder, or resume")
        if resume == MUST and not holds_run(folder):
            raise ValueError(f"output_dir is {str(output_dir)!r}, which holds no run; expected one to resume")
        check_writable("output_dir", folder)
        self._process = os.getpid()
        used = f"{str(output_dir)!r} is of a run that another process is writing just now, or a tracker of this one"
        self._lock = Lock(folder / LOCK, used)
        try:
            self.journal = Journal(folder)
            self.log_file = EventLog(folder)
        except BaseException:
            self._lock.release()
            raise
        self._verdicts = folded(self.journal.rows)
        self.sinks = [*sinks, *([] if on_verdict is None else [Reaction(on_verdict, self.verdict.state)])]
        self.workers: list[Worker] = []
        self.echo: Callable[[str], None] = echo_on_stderr
        self.quiet = False  # whether the caller reports failures
        self.ends_by_itself = True  # end with the program; False if the caller does that
        self._shown_verdict: dict[str, str] = {}
        self._noted = False  # whether a user has written the description of the run's page
        self._warned: set[str] = set()
        self._given_times: dict[int, int] = {}  # of measurements that were made before they were recorded
        self._resumes_log = self.log_file.logged  # until the first value of a training's own
        self._begun = self._closed = False
        self._stay: Callable[[], None] = lambda: None
        self._undo_signal: Callable[[], None] = lambda: None

    def open(self, params: Mapping[str, object] | None = None, tags: Mapping[str, str] | None = None) -> None:
        """Begin the run, or continue it; every sink is brought up to what the folder has."""
        if not self._is_usable():
            return
        named, now = params or {}, now_ms()
        plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in named.items()}
        self.log_file.append([ops.Params(plain, now), *([ops.Tags(dict(tags), time=now)] if tags else [])])
        self.begin(opening=True)
        if self.ends_by_itself:
            self._undo_signal = exit_on_signals()
            self._stay = end_at_exit(self.close, otherwise="KILLED")

    def begin(self, *, opening: bool = False) -> None:
        """Complete the log and start every sink, once; `opening`: the run begins or continues."""
        if self._begun:
            return
        self._begun = True
        self._complete()
        if self.mode == DISABLED:
            self.sinks = []
        paths: list[Path] = []
        for sink in list(self.sinks):
            if sink.remote and self.mode == OFFLINE:
                self.echo(f"nothing is sent to {sink.name} now; mlflow-icr sync {self.journal.folder} does that")
            try:
                path = sink.state_path(self.journal.folder)
                while path in paths:  # a second sink of a kind
                    path = path.with_name(f"{path.stem}_{path.suffix}")
                paths.append(path)
                sink.attach(self.journal.folder, self.log_file, SinkState(path, self.log_file), self.echo)
                sink.open(opening, offline=sink.remote and self.mode == OFFLINE)
            except Exception as error:  # a tracker of any kind, failing in any way, must not cost a training run
                self._warn(f"failure {sink.name}", f"{sink.name} gets nothing ({sink.reason_of(error)}); training goes on")
                continue
            if not (sink.remote and self.mode == OFFLINE):
                sink.workers = [Worker(sink, lane, self.log_file, quiet=self.quiet) for lane in sink.lanes]
                self.workers += sink.workers
        for worker in self.workers:
            worker.start()
        if opening:
            for sink in self.sinks:
                if sink.workers:
                    sink.opened()

    def _complete(self) -> None:
        """Bring the log up to the journal, after a kill or a power cut between the two."""
        missing = self.journal.operations_not_in(self.log_file)
        self.log_file.append(missing)
        if any(isinstance(one, ops.Metrics) for one in missing):  # whose verdict was not logged
            self.log_file.append(self._verdict_tags())
        self._offer(checkpoints(self.journal.folder))

    def close(self, status: str) -> dict[str, float]:
        """End the run with a status, FINISHED, FAILED or KILLED; returns the summary of the history.

        Does nothing the second time. Waits for every sink that answers. Raises OSError if the disk is full.
        """
        if self._closed or not self._is_usable():
            return {}
        self._closed = True  # set first, so that an interruption does not repeat the end
        self._stay()
        values: dict[str, float] = {}
        try:
            self.begin()
            self._complete()  # what an interrupted call has left
            values = summarise(self.journal.rows) | self.verdict.summary()
            step = max(self.journal.steps, default=0)
            last = self.log_file.summary  # a run that is opened and closed again has the same summary
            if values and (last is None or (last.step, last.values) != (step, values)):
                self.log_file.append([ops.Metrics(step, self._given_times.get(step, now_ms()), values, ops.SUMMARY)])
            kept = {step, self.verdict.checkpoint_images_seen}
            self._offer({at: path for at, path in checkpoints(self.journal.folder).items() if at in kept}, kept=True)
            self.log_file.append([ops.End(status, now_ms())])
        finally:
            drain(self.workers, patience=LAST_ATTEMPTS, closing=True)
            for sink in self.sinks if not self.quiet else ():
                if sink.waiting_text:
                    logger.warning("%s", sink.waiting_text)
                if sink.refused_text:
                    self.echo(sink.refused_text)
            self.abandon()
        return values

    def abandon(self) -> None:
        """Release the folder as a killed process does: nothing more is sent, and other processes may use it."""
        if os.getpid() != self._process:
            return
        self._closed = True
        self._stay()
        self._undo_signal()
        with self.log_file.changed:
            self.log_file.closed = True
        for worker in self.workers:
            worker.abandon()
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:
                self._warn_of(sink, error)
        self._lock.release()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(status_of(error))

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy for another process; the copy does nothing."""
        return {"_process": -1, "_warned": set(), "_closed": False, "sinks": [], "workers": [], "_noted": True,
                "_verdicts": self._verdicts, "journal": self.journal}  # fmt: skip

    def _is_usable(self) -> bool:
        """Whether this process made the tracker and it is open; others get one warning that their calls do nothing."""
        if os.getpid() == self._process:
            if self._closed:
                self._warn("closed", f"the tracker of {self.journal.folder} is closed; this is not recorded")
            return not self._closed
        if "process" not in self._warned:
            self._warned.add("process")
            logger.warning("this tracker belongs to another process; what process %d logs is not recorded", os.getpid())
        return False

    def record(self, report: Report, *, time: float | None = None) -> None:
        """Write a measurement to the journal, then to every sink; one that the journal has is not written again.

        `time` is the time of the measurement, in Unix seconds, if it is not now. Raises OSError if the disk is full.
        """
        if not self._is_usable() or report.step in self.journal.steps:
            return
        self.begin()
        for sink in self.sinks:
            sink.in_caller()
        for key, why in report.absent.items():
            self._warn(f"{key} is not measured", f"{key} is not measured: {why}")
        for key, text in report.warnings.items():
            self._warn(f"warning {key}", f"{key} is {text}")
        self.journal.append(report)
        now = now_ms()
        if time is not None:
            now = self._given_times[report.step] = round(1000 * time)
        try:
            self._verdicts.add(self.journal.by_step[report.step])
        except ValueError:  # it comes after measurements at more images seen
            self._verdicts = folded(self.journal.rows)
        self.log_file.append([*self.journal.operations(report, now), *self._verdict_tags()])

    def _verdict_tags(self) -> list[ops.Operation]:
        """The verdict as tags at the last step, unless it was logged before."""
        current = self.verdict
        texts = {"verdict": current.state, "verdict.text": current.text}
        texts |= {f"verdict.{key}": f"{value:.0f}" for key, value in current.summary().items()}
        if texts == self._shown_verdict:
            return []
        self._shown_verdict = texts
        return [ops.Tags(texts | ({} if self._noted else {NOTE: current.text}), self._verdicts.newest, now_ms())]

    def log(self, row: Logged) -> None:
        """Write a training's own values to the log, and within seconds to every sink. Raises OSError if the disk is full.

        They are not in the journal, whose rows are measurements, one for each number of images seen.
        """
        if not self._is_usable():
            return
        self.begin()
        resumes, self._resumes_log = self._resumes_log, False
        time = round(row.time * 1000)
        operation = ops.Metrics(row.step, time, dict(row.values), ops.LOGGED, dict(row.texts), resumes)
        self.log_file.append([operation], urgent=False)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log values that are neither a measurement nor a training's own, such as the results of a study."""
        self._enqueue(ops.Metrics(step, now_ms(), dict(values), ops.SUMMARY))

    def tags(self, values: Mapping[str, str]) -> None:
        """Set texts by key, of which the last stays."""
        self._enqueue(ops.Tags(dict(values), time=now_ms()))

    def note(self, markdown: str) -> None:
        """Set the description on the run's page in MLflow."""
        self._noted = True
        self.tags({NOTE: markdown})

    def describe(self, line: str) -> None:
        """Add a line below the verdict in the run's description, unless a user has written the description."""
        if not self._noted:
            self.tags({NOTE: f"{self.verdict.text}\n\n{line}"})

    def show(self, report: Report) -> None:
        """Log a report's values and pictures, but not in the journal: it is not a measurement."""
        from PIL import Image

        if not self._is_usable():
            return
        parts = text_operations(report, now_ms())
        if report.values:
            parts.append(ops.Metrics(report.step, now_ms(), dict(report.values), ops.SUMMARY))
        for key, picture in report.figures.items():
            path = self.journal.folder / "shown" / f"{uuid.uuid4().hex}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(path)
            parts.append(ops.Picture(key, report.step, now_ms(), self.journal.relative(path)))
        self._enqueue(*parts)

    def picture(self, key: str, path: Path, step: int) -> None:
        """Show a picture of a step, a PNG in the folder that stays as it is."""
        self._enqueue(ops.Picture(key, step, now_ms(), self.journal.relative(path)))

    def dataset(self, describe: Callable[[], Mapping[str, str]], context: str) -> None:
        """Describe a set of images; `context` is its use, "training" or "validation".

        `describe` gives the set's `ImageDataset.to_dict()`; its failure, too, costs no more than a warning.
        """
        try:
            description = dict(describe())
        except Exception as error:  # of whatever kind
            for sink in self.sinks:
                self._warn_of(sink, error)
            return
        self._enqueue(ops.Dataset(description, context))

    def table(self, name: str, rows: Sequence[Mapping[str, object]], step: int) -> None:
        """Write a table to `tables/<name>.csv` in the folder and show it; rows have the same keys. Nothing for no rows."""
        if not rows or not self._is_usable():
            return
        self.journal.write_table(name, rows)
        content = {"columns": list(rows[0]), "data": [[row[key] for key in rows[0]] for row in rows]}
        path = self.journal.write_file(f"tables/{name}.json", json.dumps(content, default=str).encode())
        folder = f"tables/{name}".rpartition("/")[0]
        self._enqueue(ops.File(self.journal.relative(path), folder, ops.TABLE, name, step, now_ms()))

    def figure(self, name: str, picture: np.ndarray, step: int) -> None:
        """Write a figure (H, W, 3) uint8 of the whole run to `figures/<name>.png` in the folder, and show it."""
        if self._is_usable():
            path = self.journal.write_figure(name, picture)
            self._enqueue(ops.File(self.journal.relative(path), "figures", ops.FIGURE, name, step, now_ms()))

    def embedding(self, name: str, vectors: np.ndarray, images: np.ndarray, labels: Sequence[str], step: int) -> None:
        """Show vectors (N, D) with thumbnails (N, H, W, 3) uint8 and texts where there is a projector."""
        if self._is_usable():
            path = self.journal.write_arrays(f"embeddings/{name}.npz", vectors=vectors, images=images, labels=np.array(labels))
            self._enqueue(ops.File(self.journal.relative(path), None, ops.EMBEDDING, name, step, now_ms()))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file of the output folder as an artifact, in the artifact folder `folder`."""
        self._enqueue(ops.File(self.journal.relative(path), folder or "", time=now_ms()))

    def checkpoint(self, images_seen: int) -> None:
        """Log the checkpoint at so many images seen, if it exists and was measured."""
        if self._is_usable():
            self.begin()
            self._offer({step: path for step, path in checkpoints(self.journal.folder).items() if step == images_seen})

    def _offer(self, folders: Mapping[int, Path], *, kept: bool = False) -> None:
        # A checkpoint that was logged is not logged again, unless it is now kept.
        known = self.log_file.models
        new = {step: path for step, path in folders.items() if step not in known or (kept and not known[step])}
        new = {step: path for step, path in new.items() if step in self.journal.steps}
        if not new:
            return
        current = self.verdict
        turning = None if current.turned_at is None else current.checkpoint_images_seen
        for step, path in sorted(new.items()):
            row, at = self.journal.by_step[step], self.log_file.time_of(step)
            if at is not None:
                values = {key: value for key, value in row.items() if key != "images_seen"}
                self.log_file.append([ops.Model(step, at, self.journal.relative(path), values, kept, turning)])

    def _enqueue(self, *operations: ops.Operation) -> None:
        if self._is_usable():
            self.begin()
            self.log_file.append(operations)

    @property
    def verdict(self) -> Verdict:
        """The verdict on the history so far; each row is read once."""
        return self._verdicts.verdict

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run, once it is known."""
        return next((sink.run_id for sink in self.sinks if sink.run_id is not None), None)

    @property
    def experiment_id(self) -> str | None:
        """The id of the run's experiment, once it is known."""
        return next((sink.experiment_id for sink in self.sinks if sink.experiment_id is not None), None)

    def flush_local(self) -> None:
        """Wait until every sink on this machine has everything."""
        drain([worker for worker in self.workers if not worker.sink.remote], patience=LAST_ATTEMPTS)

    def flush(self) -> bool:
        """Wait until every sink has everything, or cannot have it now; returns whether it has."""
        return drain(self.workers)

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            logger.warning("%s", text)

    def _warn_of(self, sink: Sink, error: Exception) -> None:
        self._warn(f"failure {sink.name}", not_taken(sink.name, error, self.journal.path))
        logger.debug("%s failed", sink.name, exc_info=error)

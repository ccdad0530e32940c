"""A watch on a folder of checkpoints, beside any training: each one is measured when it is whole, and verdicts are reported."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mlflow_icr.extraction.images import ImageFiles
from mlflow_icr.integrations.checkpoint_files import CheckpointFiles, Entry, changed_at, entries_of
from mlflow_icr.integrations.checkpoint_measurement import SETTINGS, CheckpointMeasurement, check_output, line_of
from mlflow_icr.integrations.saved import SavedCheckpoint, SavedTraining, Units, place_of
from mlflow_icr.monitoring import Protocol, Verdict
from mlflow_icr.reporting import conclude
from mlflow_icr.tracking import Tracker, folder_tracker

Echo = Callable[[str], None]
LOCK = ".watch.lock"
# Seconds since a file's last change after which it is no longer being written, even if two machines' clocks differ.
LONG_AGO = 60.0


@dataclass(frozen=True)
class Pace:
    """How a folder is watched: without `follow`, until all of its checkpoints are measured.

    `poll` seconds lie between two looks; a checkpoint is taken when it is whole and has not changed for `settle` seconds. With
    `follow` the watch ends when nothing new has come for `end_after` seconds, None for never. Raises ValueError for impossible
    numbers.
    """

    follow: bool = False
    poll: float = 5.0
    settle: float = 5.0
    end_after: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("poll", 0.01), ("settle", 0.0), ("end_after", 0.0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} is {value}; expected at least {least:g} seconds")


class Arrivals:
    """The checkpoints in a folder at each look: those that are whole and settled, and why others are not taken."""

    def __init__(self, folder: Path, settle: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self._settle, self._clock = folder, settle, clock
        self._since: dict[Path, tuple[Any, float]] = {}  # each name's state, and since when it has had it
        self.unsettled: dict[str, str] = {}  # by name: why it is no checkpoint yet; it may become one
        self.useless: dict[str, str] = {}  # by name: why it is no checkpoint, and will not become one

    def look(self) -> list[CheckpointFiles]:
        """The checkpoints that may be read now."""
        entries = entries_of(self._place()) if self.folder.is_dir() else []
        self.unsettled, self.useless, ready = {}, {}, []
        for entry in entries:
            settled = self._is_settled(entry)
            if entry.checkpoint is not None and settled:
                ready.append(entry.checkpoint)
            elif settled or (entry.checkpoint is None and not entry.unfinished):
                self.useless[entry.path.name] = entry.reason
            else:
                self.unsettled[entry.path.name] = entry.reason or "it was written just now"
        return ready

    def _place(self) -> Path:
        """The folder, or its `checkpoints/` where it has one: the output folder of a trainer here was given."""
        inner = self.folder / "checkpoints"
        return inner if inner.is_dir() else self.folder

    def _is_settled(self, entry: Entry) -> bool:
        now = self._clock()
        state, since = self._since.get(entry.path, (None, now))
        if state != entry.state:
            since = now
            self._since[entry.path] = entry.state, now
        changed = max((moment for _, _, moment in entry.state), default=0) / 1e9
        return now - since >= self._settle or time.time() - changed > LONG_AGO + self._settle


class CheckpointWatch:
    """Measures each checkpoint that a training leaves in a folder once, and logs that to MLflow and TensorBoard as it comes.

    `data` is the folder of training images, `base` the pipeline that the training began with (a folder, or a name on the hub),
    which is measured at 0 images seen; None where the checkpoints are pipelines themselves. Results are in `output_dir` (None:
    `icr` in the folder), and a watch that was ended continues there, in the same MLflow run. `images_per_step` None is what the
    checkpoints' metadata say, else 1; `images_per_epoch` None is the number of training images. `echo` gets a line for each
    measurement, `on_verdict` the verdict whenever its state has changed. A `reaction`, a command or a webhook's URL, gets
    it too, as `Tracker` does it. `options` are those of `load_pipeline`.

    When several checkpoints wait, the newest comes first, and then the next newest: the present model is known as early as
    possible. The earliest one comes before all of them, since growth is relative to it. Raises ValueError for input that does
    not fit, and for a folder that is watched already.
    """

    def __init__(
        self,
        folder: Path | str,
        data: Path | str,
        output_dir: Path | str | None = None,
        *,
        base: Path | str | None = None,
        images_per_step: int | None = None,
        images_per_epoch: int | None = None,
        protocol: Protocol | None = None,
        companions: Sequence[str] = (),
        batch_size: int | None = None,
        run_name: str | None = None,
        pace: Pace | None = None,
        echo: Echo = lambda text: None,
        on_verdict: Callable[[Verdict], object] = lambda verdict: None,
        reaction: str | None = None,
        **options: Any,
    ) -> None:
        self.folder, self._data, self.base = Path(folder), data, base
        self.output_dir = self.folder / "icr" if output_dir is None else Path(output_dir)
        self._images_per_step = images_per_step
        self._images_per_epoch = len(ImageFiles(data)) if images_per_epoch is None else images_per_epoch
        Units(1 if images_per_step is None else images_per_step, self._images_per_epoch)  # refuses impossible values
        self._how: dict[str, Any] = {"protocol": protocol, "companions": companions, "batch_size": batch_size}
        self._options, self._run_name, self._reaction = options, run_name, reaction
        self.pace, self._echo, self._on_verdict = pace or Pace(), echo, on_verdict
        self.measured: list[int] = []  # images seen, in the order of measuring
        self.left_out: dict[str, str] = {}  # reasons by name
        self._refused: dict[Path, float] = {}  # checkpoints that could not be loaded, and when they were written
        self._training: SavedTraining | None = None
        self._measurement: CheckpointMeasurement | None = None
        self._tracker: Tracker | None = None
        self._state = ""  # of the verdict that was reported last
        if not self.folder.is_dir() and not self.pace.follow:
            raise ValueError(f"checkpoints is {str(folder)!r}, which is no folder")
        check_output(self.output_dir, data)

    @property
    def verdict(self) -> Verdict | None:
        """The verdict on the measurements so far; None before there are any."""
        return None if self._tracker is None else self._tracker.verdict

    def run(self) -> Verdict | None:
        """Watch until all is measured, or for ever. An interruption ends the watch, and its MLflow run as finished.

        Returns the verdict, None where nothing was measured.
        """
        self.output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.output_dir / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            where = str(self.output_dir)
            raise ValueError(f"output_dir is {where!r}, which another watch is writing; expected another one") from None
        try:
            if self.base is not None:  # its errors are raised now, not when the first checkpoint comes
                self._training = SavedTraining(self.base, **self._options)
            self._watch()
            return self.verdict
        finally:
            self._close()
            lock.release()

    def _watch(self) -> None:
        arrivals = Arrivals(self.folder, self.pace.settle)
        news_at = time.monotonic()
        while True:
            due = self._due(arrivals.look())
            if due:
                self._measure(due)
                news_at = time.monotonic()
                continue  # another look before the next one: there may be a newer one by now
            if self._is_done(arrivals, time.monotonic() - news_at):
                self.left_out |= arrivals.useless | arrivals.unsettled
                return
            time.sleep(self.pace.poll)

    def _is_done(self, arrivals: Arrivals, idle: float) -> bool:
        if not self.pace.follow:
            return not arrivals.unsettled
        return self.pace.end_after is not None and idle > self.pace.end_after

    def _due(self, ready: Sequence[CheckpointFiles]) -> list[SavedCheckpoint]:
        """The checkpoints that are still to be measured, one at each number of images seen, in ascending order."""
        if self._tracker is None and ready:
            self._begin(ready[0])
        if self._measurement is None or self._tracker is None:
            return []
        steps = self._tracker.journal.steps
        by_step: dict[int, SavedCheckpoint] = {}
        for files in ready:
            step = self._measurement.units.images_seen(files.position)
            if step in steps:
                continue
            with suppress(FileNotFoundError):  # removed since the look
                if self._refused.get(files.path) != changed_at(files):
                    by_step.setdefault(step, SavedCheckpoint(step, files))
        return [by_step[step] for step in sorted(by_step)]

    def _begin(self, first: CheckpointFiles) -> None:
        """Load what the checkpoints have in common, open the trackers, and measure the weights that the training began with."""
        if self._training is None:
            self._training = SavedTraining(place_of(first), **self._options)
        self._measurement = CheckpointMeasurement(
            self._training, self._data, self.output_dir, units=self._units(first), options=self._options, **self._how
        )
        name = self._run_name or self.folder.resolve().name
        tracker = folder_tracker(self.output_dir, run_name=name, resume=True, on_verdict=self._reaction)
        tracker.journal.write_file(SETTINGS, json.dumps(self._measurement.settings).encode())
        tracker.open(self._measurement.params, {"icr.watch": "checkpoints"})
        self._tracker = tracker
        self._state = tracker.verdict.state if tracker.journal.rows else ""
        if self.base is not None and 0 not in tracker.journal.steps:
            self._echo(line_of(str(self.base), self._measurement.record(0, tracker)))

    def _units(self, first: CheckpointFiles) -> Units:
        """Images in a step: those given, those of an earlier watch, or those of a checkpoint's metadata."""
        path, per_step = self.output_dir / SETTINGS, self._images_per_step
        if per_step is None and path.is_file():
            per_step = json.loads(path.read_text()).get("images_per_step")
        return Units(per_step or first.images_per_step or 1, self._images_per_epoch)

    def _measure(self, due: Sequence[SavedCheckpoint]) -> None:
        """Measure the checkpoint whose turn it is."""
        assert self._measurement is not None
        assert self._tracker is not None
        begun = any(step > 0 for step in self._tracker.journal.steps)
        checkpoint = due[-1] if begun else due[0]
        waiting = sum(other.step < checkpoint.step for other in due)
        written = None
        try:
            written = checkpoint.time
            report = self._measurement.measure(checkpoint, self._tracker, waiting)
        except (ValueError, FileNotFoundError) as error:
            removed = not checkpoint.files.path.exists()
            why = "it was removed before it could be measured" if removed else str(error)
            if written is not None:
                self._refused[checkpoint.files.path] = written
            self.left_out[checkpoint.name] = why
            self._echo(f"{checkpoint.name} is left out: {why}")
            return
        self.measured.append(checkpoint.step)
        self._echo(line_of(checkpoint.name, report) + (f" ({len(due) - 1} more are waiting)" if len(due) > 1 else ""))
        verdict = self._tracker.verdict
        if verdict.state != self._state:
            self._state = verdict.state
            self._on_verdict(verdict)

    def _close(self) -> None:
        """Write the report, which repeats what is recorded, and end the MLflow run."""
        if self._tracker is not None:
            if self._tracker.journal.rows:
                conclude(self._tracker)
            self._tracker.close("FINISHED")

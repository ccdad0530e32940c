"""Results in TensorBoard: the same keys over the same steps, hparams in the run's own folder, sample grids."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_icr.monitoring.report import Report
from mlflow_icr.monitoring.series import HISTORY, read_history
from mlflow_icr.monitoring.verdict import Verdict
from mlflow_icr.tracking.logged import Logged
from mlflow_icr.tracking.tensorboard.custom_scalars import layout_summary, overlay, shown_part
from mlflow_icr.tracking.tensorboard.event_restart import all_events, is_restart, restart_events, shown_events

TABLE_ROWS = 50


Tags = dict[int, dict[str, float]]  # by step; values of scalars, nan for all others


def shown_tags(log_dir: Path) -> Tags:
    """What a folder's event files show at each step."""
    found: Tags = {}
    for event in all_events(log_dir):
        if is_restart(event):
            found = {step: tags for step, tags in found.items() if step < event.step}
        for value in event.summary.value:
            number = value.simple_value if value.HasField("simple_value") else math.nan
            found.setdefault(event.step, {})[value.tag] = number
    return found


class TensorBoardSink:
    """Writes event files into one folder, flushed after every measurement. On the main process only.

    Scalars are float32 there: the plain kind, which every reader of event files knows.
    """

    name = "TensorBoard"

    def __init__(self, log_dir: Path | str) -> None:
        self.log_dir = Path(log_dir)
        self._writer: Any = None
        self._folder: Path | None = None  # whose journal the overlay is computed from
        self._rows: list[dict[str, float]] = []  # of it, what the overlay is computed from
        self._resumed = False  # whether earlier processes have left event files
        self._last: dict[str, tuple[int, float]] = {}  # the last step of a tag that is shown, and the value there
        self._before: dict[str, tuple[int, float]] = {}  # the same when the training went on from a checkpoint
        self._begun: set[str] = set()  # tags that it has logged since
        self._late: int | None = None  # the earliest step that was written after a later one

    def bind(self, folder: Path) -> None:
        """Take the history in an output folder for what the overlay is computed from."""
        self._folder = folder

    def open(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Start an event file; a new run's hparams go in first."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._resumed = any(self.log_dir.glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(str(self.log_dir))
        if not self._resumed:
            plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in params.items()}
            # add_hparams would open a sub-run of its own. Of its three parts the first, a list of columns, is left out: the one
            # that TensorBoard finds first counts for all runs of a folder, and hides what others have.
            for part in hparams(plain, {})[1:2]:
                self._writer.file_writer.add_summary(part)
            self._writer.file_writer.add_summary(layout_summary())
            self._writer.add_text("run", "\n\n".join(f"**{key}**: {value}" for key, value in tags.items()), 0)
        self._writer.flush()
        shown = shown_tags(self.log_dir) if self._resumed else {}
        self._last = {tag: (step, value) for step in sorted(shown) for tag, value in shown[step].items()}
        if self._folder is not None and (self._folder / HISTORY).exists():
            self._complete_overlay(self._folder, shown)

    def _complete_overlay(self, folder: Path, there: Mapping[int, Collection[str]]) -> None:
        """Write what the journal's rows have of the overlay, and the event files have not."""
        for row in read_history(folder):
            step = int(row["images_seen"])
            self._rows.append(shown_part(row))
            self._scalars({k: v for k, v in overlay(self._rows).items() if k not in there.get(step, ())}, step)

    def dataset(self, description: Mapping[str, str], context: str) -> None:
        """Add what a set of images is as text."""
        lines = [f"**{key}**: {description[key]}" for key in ("name", "digest", "profile") if key in description]
        self._writer.add_text(f"data/{context}", "\n\n".join(lines), 0)

    def recorded(self) -> Mapping[int, set[str]]:
        """Keys by step of all that the folder's event files show."""
        if self._writer is not None:
            self._writer.flush()
        return {step: set(tags) for step, tags in shown_tags(self.log_dir).items()}

    def _moment(self, step: int) -> float | None:
        """When what is said of a step was found, in seconds: None for now, unless somebody knows better."""
        return None

    def write(self, report: Report) -> None:
        """Add a report's values as scalars and its pictures as images, its distributions as histograms."""
        time = self._moment(report.step)
        values = dict(report.values)
        if values and report.step not in {row["images_seen"] for row in self._rows}:
            self._rows.append(shown_part(report.flat()))
            values |= overlay(self._rows)
        self._scalars(values, report.step)
        for key, picture in report.figures.items():
            self._writer.add_image(key, picture, report.step, walltime=time, dataformats="HWC")
        for key, numbers in report.distributions.items():
            self._writer.add_histogram(key, numbers, report.step, walltime=time)
        for key in (*report.figures, *report.distributions):
            self._note(key, report.step)
        for key, why in report.absent.items():
            self._writer.add_text(f"absent/{key}", why, report.step)
        for key, text in report.warnings.items():
            self._writer.add_text(f"warning/{key}", text, report.step)
        self._writer.flush()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add scalars in one event, so that a kill leaves all or none: the writer's queue holds ten, too."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if values:
            scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
            self._writer.file_writer.add_summary(Summary(value=scalars), step, walltime=self._moment(step))
        for key, value in values.items():
            self._note(key, step, value)

    def _note(self, tag: str, step: int, value: float = math.nan) -> None:
        if self._last.get(tag, (step, value))[0] > step:
            self._late = step if self._late is None else min(step, self._late)
        else:
            self._last[tag] = (step, value)

    def _start_again(self, since: int, cuts: Mapping[str, int]) -> None:
        """Have everything from a step on in order, without each tag's points from its cut on."""
        self._writer.flush()
        for event in restart_events(self.log_dir, since, cuts):
            self._writer.file_writer.add_event(event, event.step, event.wall_time)
        self._writer.flush()

    def _tidy(self) -> None:
        """Have what came late, a measurement that was missing among others, in its place."""
        if self._late is not None:
            since, self._late = self._late, None
            self._start_again(since, {})

    def log(self, rows: Sequence[Logged]) -> None:
        """Add values and texts of somebody else's training at their own steps and times.

        A training that goes on from a checkpoint comes by steps again that it had logged before it was killed. What it had
        logged of a key from there on is taken back, as soon as it logs the key again.
        """
        there = self._logged_since(rows[0].time) if self._resumed else set()
        self._resumed = False  # from here on nothing comes twice
        for row in rows:
            if row.resumes:
                self._before, self._begun = dict(self._last), set()
            values = {key: value for key, value in row.values.items() if (key, row.step, row.time) not in there}
            self._take_back(values, row.step)
            for key, value in values.items():
                self._writer.add_scalar(key, value, row.step, walltime=row.time)
                self._last[key] = max((row.step, value), self._last.get(key, (row.step, value)), key=lambda last: last[0])
            for key, text in row.texts.items():
                if (f"{key}/text_summary", row.step, row.time) not in there:
                    self._writer.add_text(key, text, row.step, walltime=row.time)
        self._writer.flush()

    def _take_back(self, values: dict[str, float], step: int) -> None:
        """Have what an earlier process had logged of new keys at a step and later not count; what is the same stays."""
        cuts = {}
        for key in values.keys() - self._begun:
            self._begun.add(key)
            last, value = self._before.get(key, (-1, math.nan))
            if last == step and np.float32(value) == np.float32(values[key]):
                del values[key]
            elif last >= step:
                cuts[key] = step
        if cuts:
            self._start_again(step, cuts)

    def _logged_since(self, time: float) -> set[tuple[str, int, float]]:
        """Tag, step and time of what is shown and was logged at a time or later."""
        found = (event for event in shown_events(self.log_dir, 0) if event.wall_time >= time)
        return {(value.tag, event.step, event.wall_time) for event in found for value in event.summary.value}

    def summary(self, values: Mapping[str, float], step: int) -> None:
        """Add the summary metrics at the last step."""
        self._scalars(values, step)

    def verdict(self, verdict: Verdict, step: int) -> None:
        """Add the verdict as text at its step; it follows from the journal, and waits for the next flush."""
        self._tidy()
        self._writer.add_text("verdict", verdict.text, step)

    def table(self, name: str, rows: Sequence[Mapping[str, object]], step: int) -> None:
        """Add the first rows of a table as text, in Markdown."""
        lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
        for row in rows[:TABLE_ROWS]:
            cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
            lines.append("| " + " | ".join(cells) + " |")
        self._writer.add_text(f"tables/{name}", "\n".join(lines), step)

    def figure(self, name: str, picture: np.ndarray, step: int) -> None:
        """Add a figure of the whole run as an image."""
        self._writer.add_image(f"figures/{name}", picture, step, dataformats="HWC")
        self._writer.flush()

    def checkpoint(self, folder: Path, row: Mapping[str, float], found: Verdict, *, kept: bool = False) -> None:
        """Nothing: event files hold no models."""

    def embedding(self, name: str, vectors: np.ndarray, images: np.ndarray, labels: Sequence[str], step: int) -> None:
        """Add vectors (N, D) with thumbnails to the projector."""
        from torch import from_numpy

        thumbnails = from_numpy(images).permute(0, 3, 1, 2).float() / 255
        self._writer.add_embedding(from_numpy(vectors), list(labels), thumbnails, global_step=step, tag=name)

    def artifact(self, path: str, folder: str | None = None) -> None:
        """Nothing: event files hold no pages."""

    def flush(self) -> None:
        """Have everything in the event files, in order."""
        self._tidy()
        self._writer.flush()

    def close(self, status: str) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._tidy()
            self._writer.add_text("status", status)
            self._writer.close()

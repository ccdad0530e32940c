"""The journal: all measurements, in the output folder before any tracker gets them; and the operations that report them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mlflow_icr.extraction.files import append_line, fsync_path, write_whole
from mlflow_icr.monitoring.report import Report
from mlflow_icr.monitoring.series import HISTORY, arrays_path, distributions_path, read_distributions, read_history
from mlflow_icr.tracking.event_log import EventLog
from mlflow_icr.tracking.operations import DISTRIBUTIONS, File, Metrics, Operation, Picture, Tags, now_ms


class Journal:
    """`history.jsonl`, `images/`, `probe/` and `distributions/` of one output folder; what is appended is on the disk.

    Raises ValueError when an earlier line of an existing history is not a row.
    """

    def __init__(self, output_dir: Path | str) -> None:
        self.folder = Path(output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / HISTORY
        self.rows: list[dict[str, float]] = read_history(self.path) if self.path.exists() else []
        self.by_step = {int(row["images_seen"]): row for row in self.rows}
        self._drop_torn_line()

    @property
    def steps(self) -> Collection[int]:
        """Images seen of every recorded measurement."""
        return self.by_step.keys()

    def _drop_torn_line(self) -> None:
        """Cut off an incomplete last line, so that the next row starts on a new line."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return
        if len(content[:whole].split(b"\n")) - 1 < len(self.rows):  # the row is complete, only its newline is missing
            with self.path.open("ab") as file:
                file.write(b"\n")
        else:
            os.truncate(self.path, whole)

    def append(self, report: Report) -> None:
        """Write a report's row, flushed and fsynced, then its pictures and arrays. Raises OSError when the disk is full."""
        from PIL import Image  # an image library is only needed where something is recorded

        row = report.flat()
        append_line(self.path, json.dumps(row) + "\n")
        if not self.rows:  # the file is new
            fsync_path(self.folder)
        self.rows.append(row)
        self.by_step[report.step] = row
        for key, picture in report.figures.items():
            path = self.picture(key, report.step)
            write_whole(path, partial(Image.fromarray(picture).save, format="png"))
        kept = ((arrays_path, report.arrays), (distributions_path, report.distributions))
        for path_of, arrays in kept:
            if arrays:
                write_whole(path_of(self.folder, report.step), partial(np.savez_compressed, **arrays))  # type: ignore[arg-type]

    def write_table(self, name: str, rows: Sequence[Mapping[str, object]]) -> Path:
        """Write `tables/<name>.csv`, whole or not at all; returns its path."""
        path = self.folder / "tables" / f"{name}.csv"
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_whole(path, lambda file: file.write(text.getvalue().encode()))
        return path

    def write_file(self, name: str, content: bytes) -> Path:
        """Write a file of the folder, whole or not at all; returns its path."""
        path = self.folder / name
        write_whole(path, lambda file: file.write(content))
        return path

    def write_arrays(self, name: str, **arrays: np.ndarray) -> Path:
        """Write arrays as a file of the folder, whole or not at all; returns its path."""
        path = self.folder / name
        write_whole(path, partial(np.savez_compressed, **arrays))  # type: ignore[arg-type]
        return path

    def relative(self, path: Path) -> str:
        """A path as the folder's own, with slashes."""
        return Path(os.path.relpath(path, self.folder)).as_posix()

    def picture(self, key: str, step: int) -> Path:
        """The path of the picture of a key at a step."""
        # Parts that consist of dots would lead out of the folder.
        parts = [part if part.strip(".") else "_" * len(part) for part in key.split("/") if part]
        return self.folder.joinpath("images", *parts, f"{step:012d}.png")

    def report(self, row: dict[str, float]) -> Report:
        """The report of a recorded row, with its pictures and distributions."""
        from PIL import Image

        step = int(row["images_seen"])
        figures = {}
        for path in sorted((self.folder / "images").rglob(f"{step:012d}.png")):  # keys may have slashes
            with Image.open(path) as image:
                figures[path.parent.relative_to(self.folder / "images").as_posix()] = np.asarray(image.convert("RGB"))
        values = {key: value for key, value in row.items() if key != "images_seen"}
        has_distributions = distributions_path(self.folder, step).exists()
        return Report(step, values, figures, distributions=read_distributions(self.folder, step) if has_distributions else {})

    def operations(self, report: Report, now: int) -> list[Operation]:
        """The operations of a measurement that was appended, also of one without values."""
        step = report.step
        operations: list[Operation] = [Metrics(step, now, dict(report.values))]
        operations += [Picture(key, step, now, self.relative(self.picture(key, step))) for key in report.figures]
        if report.distributions:
            path = self.relative(distributions_path(self.folder, step))
            operations.append(File(path, None, DISTRIBUTIONS, DISTRIBUTIONS, step, now))
        return [*operations, *text_operations(report, now)]

    def operations_not_in(self, log: EventLog) -> list[Operation]:
        """Operations of measurements that are here but not in the log, after a kill or a power cut between the two."""
        logged: set[tuple[str, int]] = set()
        newest = next(reversed(log.measured), None)
        if newest is not None:  # the kill may have come before its pictures
            logged |= {_name(entry.operation) for entry in log.entries(log.measured[newest])}
        cut_off = [] if newest is None else [row for row in self.rows[-1:] if int(row["images_seen"]) == newest]
        rows = [*cut_off, *(row for row in self.rows if int(row["images_seen"]) not in log.measured)]
        parts = [part for row in rows for part in self.operations(self.report(row), now_ms())]
        return [part for part in parts if _name(part) not in logged]

    def figure(self, name: str) -> Path:
        """The path of a figure of the whole run."""
        return self.folder / "figures" / f"{name}.png"

    def write_figure(self, name: str, picture: np.ndarray) -> Path:
        """Write a figure (H, W, 3) uint8 of the whole run, replacing an older one; returns its path."""
        from PIL import Image

        path = self.figure(name)
        write_whole(path, partial(Image.fromarray(picture).save, format="png"))
        return path


def text_operations(report: Report, now: int) -> list[Operation]:
    """The reasons why values are absent or uncertain."""
    texts = {f"absent.{key}": why for key, why in report.absent.items()}
    texts |= {f"warning.{key}": text for key, text in report.warnings.items()}
    return [Tags(texts, report.step, now)] if texts else []


def _name(part: Operation) -> tuple[str, int]:
    """What identifies an operation among those of its step."""
    match part:
        case Picture(key=key, step=step) | File(name=key, step=step):
            return key, step
        case Metrics(step=step):
            return "", step
        case _:
            return "", -1

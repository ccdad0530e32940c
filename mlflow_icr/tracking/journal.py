"""The journal: everything that was measured, in the output folder, before anybody else hears of it."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from mlflow_icr.monitoring.report import Report
from mlflow_icr.monitoring.series import HISTORY, arrays_path, read_history


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _append_line(path: Path, line: str) -> None:
    """Append a line and fsync it, or leave the file as it was. Raises OSError.

    Unbuffered: a file object would keep what a full disk did not take, and write it when it is closed, after the cut.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        start = os.fstat(descriptor).st_size
        try:
            left = line.encode()
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, start)  # half a row would spoil the ones after it
            raise
    finally:
        os.close(descriptor)


def _write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Make a file that is there as a whole or not at all, also when the disk fills or the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class Journal:
    """`history.jsonl`, `images/` and `probe/` of one output folder; an appended row is on the disk when `append` returns.

    Raises ValueError when an earlier line of an existing history is not a row.
    """

    def __init__(self, output_dir: Path | str) -> None:
        self.folder = Path(output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / HISTORY
        self.rows: list[dict[str, float]] = read_history(self.path) if self.path.exists() else []
        self._drop_torn_line()

    def _drop_torn_line(self) -> None:
        """Cut an unfinished last line off, so that the next row starts on a line of its own."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return
        if len(content[:whole].split(b"\n")) - 1 < len(self.rows):  # the row is whole, only its newline is missing
            with self.path.open("ab") as file:
                file.write(b"\n")
        else:
            os.truncate(self.path, whole)

    @property
    def steps(self) -> set[int]:
        """Images seen of every recorded measurement."""
        return {int(row["images_seen"]) for row in self.rows}

    def append(self, report: Report) -> None:
        """Write a report's row, flushed and fsynced, then its pictures and arrays. Raises OSError when the disk is full."""
        from PIL import Image  # an image library is only needed where something is recorded

        row = report.flat()
        new = not self.path.exists()
        _append_line(self.path, json.dumps(row) + "\n")
        if new:
            _sync_folder(self.folder)
        self.rows.append(row)
        for key, picture in report.figures.items():
            path = self.picture(key, report.step)
            _write_whole(path, partial(Image.fromarray(picture).save, format="png"))
        if report.arrays:
            path = arrays_path(self.folder, report.step)
            _write_whole(path, lambda file: np.savez_compressed(file, **report.arrays))  # type: ignore[arg-type]

    def write_table(self, name: str, rows: Sequence[Mapping[str, object]]) -> Path:
        """Write `tables/<name>.csv`, whole or not at all; returns its path."""
        path = self.folder / "tables" / f"{name}.csv"
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        _write_whole(path, lambda file: file.write(text.getvalue().encode()))
        return path

    def write_file(self, name: str, content: bytes) -> Path:
        """Write a file of the folder, whole or not at all; returns its path."""
        path = self.folder / name
        _write_whole(path, lambda file: file.write(content))
        return path

    def picture(self, key: str, step: int) -> Path:
        """Where the picture of a key at a step is kept."""
        return self.folder / "images" / key / f"{step:012d}.png"

    def report(self, row: dict[str, float]) -> Report:
        """A recorded row as a report again, with the pictures that were kept for it."""
        from PIL import Image

        step = int(row["images_seen"])
        figures = {}
        for path in sorted((self.folder / "images").glob(f"*/{step:012d}.png")):
            with Image.open(path) as image:
                figures[path.parent.name] = np.asarray(image.convert("RGB"))
        return Report(step, {key: value for key, value in row.items() if key != "images_seen"}, figures)

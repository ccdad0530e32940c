"""What a training logs of its own: plain values and texts at its own steps, in a file of their own beside the journal.

The journal has one row for each measurement, at images seen. A training's own values come at any step, as often as it likes,
so they have `logged/values.jsonl`, which is written first; every sink is then brought up to the file, some seconds' worth at
a time, and a sink that fails is asked again less and less often.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from mlflow_icr.extraction.files import write_whole

logger = logging.getLogger(__name__)

FOLDER, VALUES, SENT = "logged", "values.jsonl", "sent.json"
# A round of calls costs a server some 25 ms: this often, it is less than a hundredth of the training.
FLUSH_SECONDS = 3.0
LONGEST_PAUSE = 600.0  # between attempts at a sink that fails
BATCH_BYTES = 4 * 2**20  # of the file at a time, so that a sink that was away for days costs no memory
LONGEST_LIST = 64  # numbers of one list or vector that become values of their own
LONGEST_KEY = 250  # MLflow's limit


@dataclass(frozen=True)
class Logged:
    """Values and texts by key that were logged together, at `step` (the training's own unit) and `time` (Unix seconds).

    `resumes`: it is the first of a later process, which may come by steps again that an earlier one had logged already. Of
    each key, what is logged from here on counts in place of what was logged before at the same step and later ones.
    """

    step: int
    time: float
    values: Mapping[str, float]
    texts: Mapping[str, str] = field(default_factory=dict)
    resumes: bool = False


def clean_key(key: object) -> str:
    """A key that MLflow, TensorBoard and a file system take: `[A-Za-z0-9_./-]`, no empty or dotted parts, 250 characters."""
    parts = re.sub(r"[^A-Za-z0-9_./-]", "_", str(key)).split("/")
    return "/".join(part if part.strip(".") else "_" * len(part) for part in parts if part)[:LONGEST_KEY].rstrip("/") or "_"


def plain_values(values: Mapping[Any, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Numbers and texts by clean key, from what people log: numbers, 0-d tensors and arrays on any device, text, nested dicts.

    A dict's keys are joined with `/`; short lists and vectors have their places as keys. Anything else becomes text.
    """
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for key, value in _leaves(values):
        if isinstance(value, (bool, int, float, np.number, np.bool_)):
            numbers[clean_key(key)] = float(value)
        else:
            texts[clean_key(key)] = str(value)
    return numbers, texts


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if hasattr(value, "detach"):  # a tensor, perhaps in bfloat16, which numpy does not have
            value = value.detach().cpu()
            value = (value.float() if value.is_floating_point() else value).numpy()
        if isinstance(value, np.ndarray) and value.size == 1:
            value = value.reshape(()).item()
        if isinstance(value, np.ndarray) and value.ndim == 1:
            value = value.tolist()
        if isinstance(value, (list, tuple)) and 0 < len(value) <= LONGEST_LIST and all(_number(v) for v in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}/")
        else:
            yield name, value


def _number(value: object) -> bool:
    return isinstance(value, (bool, int, float, np.number)) or (hasattr(value, "detach") and getattr(value, "ndim", 1) == 0)


def read_logged(output_dir: Path | str) -> list[Logged]:
    """All that a training logged of its own, in order, without a torn last line, also what a resumed one took back.

    Raises FileNotFoundError.
    """
    with (Path(output_dir) / FOLDER / VALUES).open("rb") as file:
        return [_row(line) for line in file if line.endswith(b"\n")]


def _row(line: bytes) -> Logged:
    content = json.loads(line)
    values = {key: float(value) for key, value in content["values"].items()}
    return Logged(content["step"], content["time"], values, content.get("texts", {}), content.get("resumes", False))


def _line(row: Logged) -> bytes:
    """A row as strict JSON: numbers that are not finite, which a diverged loss is, as text."""
    values = {key: value if math.isfinite(value) else str(value) for key, value in row.values.items()}
    content: dict[str, Any] = {"step": row.step, "time": row.time, "values": values}
    if row.texts:
        content["texts"] = dict(row.texts)
    if row.resumes:
        content["resumes"] = True
    return (json.dumps(content, allow_nan=False) + "\n").encode()


@dataclass
class _Place:
    """How far a sink has come in the file, and when to ask it again."""

    offset: int = 0
    next_try: float = 0.0
    pause: float = FLUSH_SECONDS


class LoggedValues:
    """`logged/values.jsonl` of an output folder, and how far each sink has come in it.

    `send(sink name, rows)` hands rows to one sink and says whether it took them. A row is with the operating system when
    `add` returns, which a killed process does not undo, and on the disk with the next flush, which another thread may do.
    """

    def __init__(self, output_dir: Path | str, sinks: Sequence[str], send: Callable[[str, list[Logged]], bool]) -> None:
        self.folder = Path(output_dir) / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = (self.folder / VALUES).open("ab", buffering=0)
        self._drop_torn_line()
        self._resumes = (self.folder / VALUES).stat().st_size > 0
        sent = self._read_sent()
        self._places = {name: _Place(sent.get(name, 0)) for name in sinks}
        self._send = send
        self._next_flush = 0.0

    def _drop_torn_line(self) -> None:
        with (self.folder / VALUES).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - BATCH_BYTES))  # no line is as long
            tail = file.read()
        os.truncate(self.folder / VALUES, size - len(tail) + tail.rfind(b"\n") + 1)

    def _read_sent(self) -> dict[str, int]:
        try:
            return {str(k): int(v) for k, v in json.loads((self.folder / SENT).read_text()).items()}
        except (FileNotFoundError, ValueError):  # a sink that is sent everything again has nothing twice
            return {}

    def add(self, row: Logged) -> bool:
        """Write a row; whether it is time for a flush, which is said once. Raises OSError when the disk is full."""
        line = _line(replace(row, resumes=True) if self._resumes else row)
        start = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(28, "No space left on device", str(self.folder / VALUES))
        except OSError:
            os.ftruncate(self._file.fileno(), start)  # half a row would spoil the ones after it
            raise
        self._resumes = False
        if time.monotonic() < self._next_flush:
            return False
        self._next_flush = math.inf
        return True

    def flush(self, *, last: bool = False) -> None:
        """Bring every sink up to the file, but one that failed only when its pause is over, or it is the last time."""
        try:
            os.fsync(self._file.fileno())
            for name, place in self._places.items():
                if last or time.monotonic() >= place.next_try:
                    self._catch_up(name, place)
            content = json.dumps({name: place.offset for name, place in self._places.items()}).encode()
            write_whole(self.folder / SENT, lambda file: file.write(content))
        finally:
            self._next_flush = time.monotonic() + FLUSH_SECONDS

    def _catch_up(self, name: str, place: _Place) -> None:
        with (self.folder / VALUES).open("rb") as file:
            end = os.fstat(file.fileno()).st_size  # what is added in the meantime is for the next time, or there is no end
            file.seek(place.offset)
            while file.tell() < end:
                lines = [line for line in file.readlines(BATCH_BYTES) if line.endswith(b"\n")]  # the last may be half there
                if lines and not self._send(name, [_row(line) for line in lines]):
                    place.next_try = time.monotonic() + place.pause
                    place.pause = min(2 * place.pause, LONGEST_PAUSE)
                    return
                place.offset, place.pause = place.offset + sum(map(len, lines)), FLUSH_SECONDS

    def close(self) -> None:
        """Bring every sink up to the file one last time, and close it."""
        self.flush(last=True)
        self._file.close()

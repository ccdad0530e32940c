"""A history as rows, and one key of it as a series over images seen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

HISTORY = "history.jsonl"
Rows = Sequence[Mapping[str, float]]


def series(rows: Iterable[Mapping[str, float]], key: str) -> list[tuple[int, float]]:
    """(images seen, value) of the rows that hold the key, in order; a step written twice counts with its last row."""
    return sorted({int(row["images_seen"]): float(row[key]) for row in rows if key in row}.items())


def read_history(path: Path | str) -> list[dict[str, float]]:
    """The rows of a `history.jsonl`, or of the output folder that holds one, in the order of writing.

    A torn last line, which a kill or a full disk can leave, is not a row. Raises FileNotFoundError when there is no
    history, ValueError naming the line when another line is not a row.
    """
    given = path = Path(path)
    if path.is_dir():
        path = path / HISTORY
    if not path.exists():
        raise FileNotFoundError(f"folder is {str(given)!r}, which holds no {HISTORY}; expected the output folder of a run")
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("images_seen"), int):
                raise ValueError("no images_seen")
        except ValueError as error:
            if number == len(lines):  # the text did not end in a newline: the line was never finished
                break
            raise ValueError(f"{path}, line {number}: not a measurement ({error})") from None
        rows.append(row)
    return rows


def arrays_path(output_dir: Path | str, step: int) -> Path:
    """The file with the numbers of each probe image at a step."""
    return Path(output_dir) / "probe" / f"{step:012d}.npz"


def distributions_path(output_dir: Path | str, step: int) -> Path:
    """The file of a step's histogram data."""
    return Path(output_dir) / "distributions" / f"{step:012d}.npz"


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def read_arrays(output_dir: Path | str, step: int) -> dict[str, np.ndarray]:
    """The numbers of each probe image at a step, (N,) by key such as `repr/influence`. Raises FileNotFoundError."""
    return _read_npz(arrays_path(output_dir, step))


def read_distributions(output_dir: Path | str, step: int) -> dict[str, np.ndarray]:
    """A step's histogram data, (M,) by key such as `repr/eigenvalues`. Raises FileNotFoundError."""
    return _read_npz(distributions_path(output_dir, step))


def rows_of(history: Path | str | Iterable[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """The rows of a history that is given as a path or as rows."""
    if isinstance(history, (str, Path)):
        return list(read_history(history))
    return list(history)

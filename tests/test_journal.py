"""The journal: what is appended is on the disk as a whole, whatever happens to the disk or the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from mlflow_icr import Report
from mlflow_icr.tracking import Journal, read_arrays, read_history
from tests.test_tracking import report


def test_a_torn_last_line_is_not_a_row_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(report(0))
    journal.append(report(1))
    with journal.path.open("a") as file:
        file.write('{"images_seen": 2, "repr/i')
    assert [row["images_seen"] for row in read_history(tmp_path)] == [0, 1]
    resumed = Journal(tmp_path)
    resumed.append(report(2))
    assert [row["images_seen"] for row in read_history(tmp_path)] == [0, 1, 2]
    # A row that only lacks its newline was measured, and stays.
    journal.path.write_bytes(journal.path.read_bytes()[:-1])
    whole = Journal(tmp_path)
    whole.append(report(3))
    assert [row["images_seen"] for row in read_history(tmp_path)] == [0, 1, 2, 3]


def test_a_file_that_the_disk_does_not_take_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an archive would be read as the influences of a measurement."""
    journal = Journal(tmp_path)
    values = np.linspace(0, 1, 50, dtype=np.float32)

    def half(file: IO[bytes], **arrays: np.ndarray) -> None:
        file.write(b"PK half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", half)
    with pytest.raises(OSError, match="No space left"):
        journal.append(Report(3, {"repr/icr": 0.5}, arrays={"repr/influence": values}))
    assert [row["images_seen"] for row in read_history(tmp_path)] == [3]
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path, 3)
    monkeypatch.undo()
    journal.append(Report(4, {"repr/icr": 0.5}, arrays={"repr/influence": values}))
    assert np.array_equal(read_arrays(tmp_path, 4)["repr/influence"], values)


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"images_seen": 0}\nnonsense\n{"images_seen": 2}\n')
    with pytest.raises(ValueError, match=r"history.jsonl, line 2: not a measurement"):
        read_history(tmp_path)


def test_a_full_disk_leaves_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.append(report(0))
    with monkeypatch.context() as full:

        def no_space(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        full.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            journal.append(report(1))
    journal.append(report(2))
    lines = journal.path.read_text().splitlines()
    assert [json.loads(line)["images_seen"] for line in lines] == [0, 2]


def test_a_partial_write_is_taken_back(tmp_path: Path) -> None:
    """A real limit on the file's size, which cuts a row in the middle, as a full disk does."""
    code = """
import resource, sys
from mlflow_icr import Report
from mlflow_icr.tracking import Journal, read_history

journal = Journal(sys.argv[1])
journal.append(Report(0, {"repr/icr": 0.5}))
size = journal.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
try:
    journal.append(Report(1, {"repr/icr": 0.25, "mem/ratio_l2": 0.125}))
except OSError:
    print("refused", journal.path.stat().st_size - size)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.append(Report(2, {"repr/icr": 0.75}))
print([row["images_seen"] for row in read_history(sys.argv[1])], sorted(journal.steps))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["refused 0", "[0, 2] [0, 2]"], done.stderr

"""Atomic writes of files and lines, and the cache folder."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

CACHE_VARIABLE = "MLFLOW_ICR_CACHE"  # a folder, or "off"


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically by `write`: after a full disk or a kill there is the old file or the new one, never a part.

    Processes that write the same file at once do not disturb each other. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def fsync_path(path: Path) -> None:
    """fsync a folder or a file, so that a new name or the content survives a power cut.

    Windows cannot open a folder for that, and takes a file only where it may be written.
    """
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, line: str, *, sync: bool = True, at: int | None = None) -> None:
    """Append one or more lines and fsync them, or leave the file unchanged. Raises OSError, also if it does not end `at`.

    Without `sync` they survive the process, but not a power cut.

    It writes unbuffered: a file object would keep bytes that a full disk refused, and write them on closing, after the
    truncation.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        start = os.fstat(descriptor).st_size
        if at not in (None, start):
            raise OSError(errno.ESTALE, "another process has changed or replaced it", str(path))
        try:
            remaining = line.encode()
            while remaining:
                remaining = remaining[os.write(descriptor, remaining) :]
            if sync:
                os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, start)  # a partial row would damage the rows after it
            raise
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, read in parts."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def check_outside(output_dir: Path, data: Path | str) -> None:
    """Raise ValueError for an output folder inside a folder of data: its pictures would be taken for training images."""
    inside = Path(data).is_dir() and output_dir.resolve().is_relative_to(Path(data).resolve())
    if inside:
        raise ValueError(
            f"output_dir is {str(output_dir)!r}, in data {str(data)!r}, where its pictures would be read as training images; "
            "expected another"
        )


def cache_folder() -> Path | None:
    """Where embeddings and weights are kept; None where $MLFLOW_ICR_CACHE is "off".

    That is $MLFLOW_ICR_CACHE, else mlflow-icr in $XDG_CACHE_HOME or ~/.cache.
    """
    configured = os.environ.get(CACHE_VARIABLE, "")
    if configured.lower() == "off":
        return None
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlflow-icr"

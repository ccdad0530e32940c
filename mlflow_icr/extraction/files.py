"""Files, and lines of files, that are there as a whole or not at all; and the folder of what is kept between runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

CACHE_VARIABLE = "MLFLOW_ICR_CACHE"  # a folder, or "off"


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Make a file by `write`, also when the disk fills or the process is killed: the old one, the new one, never a part.

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
    """Make a new name in a folder, or the content of a file, survive a power cut.

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


def append_line(path: Path, line: str, *, sync: bool = True) -> None:
    """Append one line or several and fsync them, or leave the file as it was. Raises OSError.

    Without `sync` they survive the process, but not a power cut.

    Unbuffered: a file object would keep what a full disk did not take, and write it when it is closed, after the cut.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        start = os.fstat(descriptor).st_size
        try:
            left = line.encode()
            while left:
                left = left[os.write(descriptor, left) :]
            if sync:
                os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, start)  # half a row would spoil the ones after it
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


def cache_folder() -> Path | None:
    """Where embeddings and weights are kept; None where $MLFLOW_ICR_CACHE is "off".

    That is $MLFLOW_ICR_CACHE, else mlflow-icr in $XDG_CACHE_HOME or ~/.cache.
    """
    given = os.environ.get(CACHE_VARIABLE, "")
    if given.lower() == "off":
        return None
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlflow-icr"

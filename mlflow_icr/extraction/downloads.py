"""Downloads that resume after an interruption, are checked by SHA-256, and appear only when they are complete."""

from __future__ import annotations

import errno
import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from mlflow_icr.extraction.files import file_sha256, fsync_path

BLOCK = 2**20  # bytes read at a time
TIMEOUT = 30.0  # seconds without a byte, after which a connection counts as lost
ATTEMPTS = 5  # attempts in a row without a byte, before the download is given up
FINAL_CODES = (401, 403, 404, 410)  # status codes for which another attempt is useless
NOTHING_LEFT = 416  # the answer to a request for bytes beyond the end

Progress = Callable[[int, int | None], object]
"""Called with the bytes received so far, and the total or None where the server does not say."""


def _quiet(received: int, total: int | None) -> None:
    """Report no progress."""


def download(
    url: str,
    path: Path,
    sha256: str = "",
    *,
    progress: Progress = _quiet,
    timeout: float = TIMEOUT,
    pause: Callable[[float], object] = time.sleep,
) -> str:
    """Download a file to `path` and return its SHA-256; `path` appears only when it is complete and its checksum fits.

    Bytes are kept in `<name>.part` beside it. After a lost connection, or in a later call, the download resumes there, if the
    server can do that and its file is still the same. Without `sha256` only the length is checked. Raises ValueError for
    another checksum (the file is deleted), and OSError for a server that does not answer or a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    lock = FileLock(f"{part}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(f"{path.name} is being downloaded by another process") from None
    try:
        with part.open("ab") as file:
            _receive_all(url, file, part, progress, timeout, pause)
            file.flush()
            os.fsync(file.fileno())
        digest = file_sha256(part)
        if sha256 and digest != sha256:
            part.unlink()
            _tag_path(part).unlink(missing_ok=True)
            raise ValueError(f"{url} gives a file with SHA-256 {digest}; expected {sha256}: it was deleted")
        part.replace(path)
        _tag_path(part).unlink(missing_ok=True)
        fsync_path(path.parent)
        return digest
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def _tag_path(part: Path) -> Path:
    """The file with the server's entity tag, by which the server knows whether a partial download still fits."""
    return part.with_name(f"{part.name}.etag")


def _receive_all(
    url: str, file: IO[bytes], part: Path, progress: Progress, timeout: float, pause: Callable[[float], object]
) -> None:
    failures = 0
    while True:
        before = file.tell()
        try:
            if _receive(url, file, part, progress, timeout):
                return
            reason = "the connection was lost"
        except urllib.error.HTTPError as error:
            if error.code == NOTHING_LEFT:  # a process ended between the last byte and the checksum
                if error.headers.get("Content-Range") == f"bytes */{before}":
                    return
                file.truncate(0)
            if error.code in FINAL_CODES:
                raise OSError(f"{url} answers {error.code} {error.reason}") from None
            reason = f"it answers {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        failures = 0 if file.tell() > before else failures + 1
        if failures == ATTEMPTS:
            raise OSError(
                f"{url} cannot be downloaded: {reason}; {file.tell()} bytes are kept, and the next attempt resumes there"
            )
        pause(float(2**failures))


def _receive(url: str, file: IO[bytes], part: Path, progress: Progress, timeout: float) -> bool:
    """Append the bytes after those on disk; returns whether the file is complete."""
    tag_path, start = _tag_path(part), file.tell()
    headers = {"User-Agent": "mlflow-icr", "Accept-Encoding": "identity"}
    if start and tag_path.exists():
        headers |= {"Range": f"bytes={start}-", "If-Range": tag_path.read_text()}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
        if answer.status != 206 or not str(answer.headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
            file.truncate(0)  # the server cannot resume, or its file has changed
            start = 0
        _keep_tag(answer, tag_path)
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        _check_space(part, total, start)
        file.seek(0, os.SEEK_END)
        progress(start, total)
        while block := answer.read(BLOCK):
            file.write(block)
            progress(file.tell(), total)
    return total is None or file.tell() == total


def _keep_tag(answer: Any, path: Path) -> None:
    tag = answer.headers.get("ETag", "")
    if tag and not tag.startswith("W/"):  # a weak tag does not promise the same bytes
        path.write_text(tag)
    else:
        path.unlink(missing_ok=True)


def _check_space(part: Path, total: int | None, received: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - received > free:
        raise OSError(errno.ENOSPC, f"{total - received} more bytes are needed, and the disk has {free}", str(part.parent))

"""Arrays too large to be kept twice: in a file that is mapped into memory, which the system may write out and read again."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import mkstemp

import numpy as np

MAPPED_BYTES = 256 * 2**20  # smaller arrays lie in memory


def new_file(folder: Path | None, size: int) -> Path:
    """A file of `size` bytes that are on the disk for certain: a full disk is an error now, not a crash when pages are written.

    Raises OSError naming the folder.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = mkstemp(prefix="images-", suffix=".bin", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
    except OSError as error:
        os.unlink(name)
        message = f"{size / 2**30:.1f} GiB for images, which {os.path.dirname(name)} has no room for"
        raise OSError(error.errno, message) from None
    finally:
        os.close(descriptor)
    return Path(name)


def mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A file as an array; whoever maps it shares its memory."""
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)


class Store:
    """Where a set's images are put: in memory, or, where they are many or `shared`, in a file in `folder`.

    None is the system's folder for temporary files. `path` is the file until `forget`; whoever has mapped it keeps its content.
    """

    def __init__(self, folder: Path | None = None, *, shared: bool = False) -> None:
        self.folder, self.shared = folder, shared
        self.path: Path | None = None

    def new(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A new array in place of what was there; its values are anything. Raises OSError where there is no room."""
        self.forget()
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if not self.shared and size < MAPPED_BYTES:
            return np.empty(shape, dtype)
        self.path = new_file(self.folder, size)
        array = mapped(self.path, shape, dtype)
        if not self.shared:
            self.forget()
        return array

    def forget(self) -> None:
        """Remove the file's name, if there is one."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self.path = None

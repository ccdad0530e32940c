"""Large arrays in a file that is mapped into memory, so that the system may write pages out and read them again."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import mkstemp

import numpy as np

MAPPED_BYTES = 256 * 2**20  # smaller arrays lie in memory


def new_file(folder: Path | None, size: int) -> Path:
    """A file whose `size` bytes are allocated on the disk: a full disk is an error now, not a crash when pages are written.

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
        message = f"{size / 2**30:.1f} GiB for images, which do not fit in {os.path.dirname(name)}"
        raise OSError(error.errno, message) from None
    finally:
        os.close(descriptor)
    return Path(name)


def mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A file as a mapped array; all processes that map it share its memory."""
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)


class Store:
    """Allocates the array of a set's images: in memory or, if it is large or `shared`, in a file in `folder`.

    `folder` None is the system's folder for temporary files. `path` is the file until `forget`; existing mappings stay valid.
    """

    def __init__(self, folder: Path | None = None, *, shared: bool = False) -> None:
        self.folder, self.shared = folder, shared
        self.path: Path | None = None

    def new(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A new uninitialised array, which replaces the former one. Raises OSError if the disk is full."""
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

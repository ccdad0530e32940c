"""Sources of file bytes, a folder or an archive, and the headers of files, which are read before pixels."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Protocol

from mlflow_icr.extraction.images.picture import Picture, Span


class FileReader(Protocol):
    """Anything that returns the bytes of a file by its name."""

    def names(self) -> list[str]:
        """The names of all files, with slashes."""

    def read(self, name: str) -> bytes:
        """The file's bytes."""

    def path_of(self, name: str) -> Path | None:
        """Where the file is by itself; None inside an archive."""


@dataclass(frozen=True, eq=False)
class FileSource:
    """One file, by its name; `alone` if there is no other file, so that an array holds many images."""

    name: str
    reader: FileReader
    alone: bool = False

    @property
    def path(self) -> Path | None:
        """Where the file is by itself; None inside an archive."""
        return self.reader.path_of(self.name)

    def open(self) -> IO[bytes]:
        """The file's bytes, from the first."""
        path = self.path
        return io.BytesIO(self.reader.read(self.name)) if path is None else path.open("rb")

    def begins(self, count: int) -> bytes:
        """The first bytes."""
        with self.open() as file:
            return file.read(count)

    @contextmanager
    def on_disk(self) -> Iterator[Path]:
        """A context with a path to the file, for libraries that need one: the file's own, or that of a temporary copy."""
        if self.path is not None:
            yield self.path
            return
        with NamedTemporaryFile(suffix=Path(self.name).name) as copy:  # the suffix says what it is
            copy.write(self.reader.read(self.name))
            copy.flush()
            yield Path(copy.name)


@dataclass(frozen=True, eq=False)
class Header:
    """The header of a file: how many images it holds, and the type of their values; `plain` means bytes.

    `subject` is the patient, if known, and `labels` are the images' classes. `remark` says how an ambiguous header was read.
    """

    frames: int = 1
    plain: bool = False
    stated: Span | None = None
    subject: str = ""
    labels: Sequence[int] | Sequence[str] | None = field(default=None, repr=False)
    remark: str = ""


@dataclass(frozen=True)
class Format:
    """A kind of file: its suffixes, its header (None where each file is one image), and its images.

    `pictures(source, frames, background)` yields the images with these numbers, in this order.
    """

    name: str
    suffixes: tuple[str, ...]
    pictures: Callable[[FileSource, Sequence[int], str], Iterator[Picture]]
    header: Callable[[FileSource], Header] | None = None

"""Which image files a folder or an archive holds, in what order, and what their folders say of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch
from torch import Tensor

from mlflow_icr.extraction.images.archives import ZipArchive

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


class FileReader(Protocol):
    """Whatever gives the bytes of a file by its name."""

    def read(self, name: str) -> bytes:
        """The file's bytes."""


class Folder:
    """The files below a folder, by names relative to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """The names of all files, with slashes."""
        return [path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()]

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        return (self.path / name).read_bytes()


class ImageFiles:
    """The image files of a folder or of a zip, in the order of their names.

    `names` are relative, with slashes. Raises ValueError for a place without images, and for an archive that is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.reader: Folder | ZipArchive
        if self.path.is_dir():
            self.reader = Folder(self.path)
        else:
            self.reader = ZipArchive(self.path)
        self.names = ordered_images(self.reader.names())
        if not self.names:
            kind = "a folder" if self.path.is_dir() else "an archive"
            raise ValueError(f"data is {str(path)!r}, {kind} without images ({', '.join(sorted(SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.names)

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises ValueError or OSError where they cannot be read."""
        return self.reader.read(name)

    def labels(self) -> Tensor | None:
        """The class of each image, (N,) integers, as `labels_of`."""
        return labels_of(self.names)


def is_archive(path: Path | str) -> bool:
    """Whether a path is that of a zip."""
    return Path(path).suffix.lower() == ".zip" and Path(path).is_file()


def is_hidden(name: str) -> bool:
    """Whether a file is none of the images: what systems add to folders (`.DS_Store`, `__MACOSX/`, `._image.png`)."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def ordered_images(names: Sequence[str]) -> list[str]:
    """Those of the names that are image files, ordered by their parts: the files of one folder are beside each other."""
    images = [name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES and not is_hidden(name)]
    return sorted(images, key=lambda name: PurePosixPath(name).parts)


def image_paths(folder: Path | str) -> list[Path]:
    """All image files below a folder, in the order of their paths."""
    return [Path(folder) / name for name in ordered_images(Folder(Path(folder)).names())]


def labels_of(names: Sequence[str]) -> Tensor | None:
    """Classes (N,) integers of images that lie in one subfolder for each class; None where they do not.

    Folders that hold everything (an archive of `cifar10/airplane/0.png`) are passed over.
    """
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    while folders and all(folders) and len({parts[0] for parts in folders}) == 1:
        folders = [parts[1:] for parts in folders]
    if not folders or not all(folders):
        return None
    classes = {name: place for place, name in enumerate(sorted({parts[0] for parts in folders}))}
    return torch.tensor([classes[parts[0]] for parts in folders])


def folder_labels(folder: Path | str) -> Tensor | None:
    """The class of each image of a folder, (N,) integers, where the images lie in one subfolder for each class; else None."""
    return labels_of(ordered_images(Folder(Path(folder)).names()))

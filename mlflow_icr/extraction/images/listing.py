"""The images of a folder, an archive or a file, in order, with the labels and groups from folders and headers."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from mlflow_icr.extraction.images.archives import ZipArchive
from mlflow_icr.extraction.images.formats import (
    ARRAYS,
    DICOM,
    RASTER_SUFFIXES,
    SUFFIXES,
    TABLES,
    format_of,
    is_dicom,
    may_be_dicom,
)
from mlflow_icr.extraction.images.sources import FileReader, FileSource, Format, Header
from mlflow_icr.extraction.images.splits import beside_images, one_split

MOST_NAMED = 10  # files that cannot be read, in one line
GROUP_BY = ("folder", "file", "patient")
# Suffixes of files that are not read; a note names them where they lie among images that are.
UNREAD = (
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".ppm", ".pgm", ".pnm", ".tga", ".psd", ".exr", ".hdr", ".svg", ".dng",
    ".cr2", ".cr3", ".nef", ".arw", ".raw", ".mha", ".mhd", ".nrrd", ".mgz", ".h5", ".hdf5", ".mat", ".fits", ".czi",
    ".svs", ".mp4", ".mov", ".avi", ".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".tfrecord", ".pt", ".pth", ".pkl",
)  # fmt: skip
EDM_LABELS = "dataset.json"  # beside the images, in archives of the StyleGAN and EDM family


def _files_below(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """The names of files below a folder; `above` are the real paths that lead to it, so that links in a circle end."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
                if real not in above:
                    yield from _files_below(entry.path, f"{prefix}{entry.name}/", (*above, real))
            elif entry.is_file() or not os.path.exists(entry.path):
                yield prefix + entry.name


class Folder:
    """The files below a folder, by names relative to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """The names of all files, with slashes; links are followed, and those that lead nowhere are named too.

        Raises OSError for a folder that cannot be read.
        """
        return list(_files_below(str(self.path), "", (os.path.realpath(self.path),)))

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        return (self.path / name).read_bytes()

    def path_of(self, name: str) -> Path:
        """Where a file is."""
        return self.path / name


class LoneFile(Folder):
    """One file, as a folder that holds only this file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.parent)
        self.name = path.name

    def names(self) -> list[str]:
        """Its name."""
        return [self.name]


class Listing:
    """The images in files: `items` gives for each image its file and its number in it, and `names` its name.

    If a file holds several images, their names end in `#` and the number, from 0. `notes` are remarks on ambiguous files.
    """

    def __init__(
        self,
        path: Path | str,
        files: Sequence[FileSource],
        formats: Sequence[Format],
        headers: Sequence[Header],
        notes: Sequence[str] = (),
    ) -> None:
        self.path, self.files, self.formats = Path(path), files, formats
        self.headers, self.notes = headers, list(notes)
        self.items = [(i, frame) for i, header in enumerate(headers) for frame in range(header.frames)]
        self.names = [files[i].name if headers[i].frames == 1 else f"{files[i].name}#{frame}" for i, frame in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def scanned(self) -> bool:
        """Whether each file's header states the range of its images' values."""
        return all(kind.header is not None for kind in self.formats)

    def rows_of_files(self) -> bool:
        """Whether all images are rows of tables or arrays: then images of one file do not belong together."""
        return all(kind in (ARRAYS, TABLES) for kind in self.formats)

    def labels(self) -> Tensor | None:
        """The class of each image, (N,) integers: the files' own, those in `dataset.json`, or by folders as `labels_of`."""
        if all(header.labels is not None for header in self.headers):
            return _numbered([label for header in self.headers if header.labels is not None for label in header.labels])
        listed = _listed_labels(self.files[0].reader)
        if listed is not None:
            names = [self.files[i].name for i, _ in self.items]
            if all(name in listed for name in names):
                return torch.tensor([listed[name] for name in names])
        return labels_of([self.files[i].name for i, _ in self.items])

    def groups(self, by: str) -> list[str]:
        """The group of each image: its `folder`, its `file`, its `patient` (DICOM), or the match of an expression in its name.

        If a regular expression has a group in parentheses, that group is taken. Raises ValueError for an invalid expression,
        and for images without a group, which it names.
        """
        files = [self.files[i].name for i, _ in self.items]
        match by:
            case "folder":
                groups = [str(PurePosixPath(name).parent) for name in files]
            case "file":
                groups = files
            case "patient":
                groups = [self.headers[i].subject for i, _ in self.items]
            case _:
                groups = [_matched(by, name) for name in files]
        missing = sorted({name for name, group in zip(files, groups, strict=True) if not group})
        if missing:
            what = "no PatientID in" if by == "patient" else "no match in"
            raise ValueError(f"group_by is {by!r}: {what} {len(missing)} of {len(set(files))} files: {named(missing)}")
        return groups


class ImageFiles(Listing):
    """The images of a folder, of a zip, or of one file, in the order of the files' names, and of the images in a file.

    Names are relative, with slashes. The commonest kind of files (images, DICOM, volumes, arrays, tables) is taken; where their
    folders (or the names of tables) are called train, validation or test, only those of `split` are. With `listed` the files
    are these paths, in this order. Raises ValueError for a place without images, for an archive that is damaged, and for
    headers that cannot be read, naming the files.
    """

    def __init__(self, path: Path | str, listed: Sequence[str] | None = None, split: str = "train") -> None:
        path, notes = Path(path), list[str]()
        self.has_splits = False
        reader: FileReader
        if not path.exists():
            raise ValueError(f"{str(path)!r} is not there; expected a folder, an archive or a file of images")
        if listed is not None:
            reader = Folder(Path())
        elif path.is_dir():
            reader = Folder(path)
        elif path.suffix.lower() == ".zip":
            reader = ZipArchive(path)
        else:
            reader = LoneFile(path)
        files, formats = _chosen_files(path, reader, listed, notes)
        if listed is None:
            places, remark = one_split([file.name for file in files], split, by_stem=TABLES in formats)
            files, formats = [files[place] for place in places], [formats[place] for place in places]
            notes += [f"{str(path)!r}: {remark}"] if remark else []
            self.has_splits = bool(remark)
        super().__init__(path, files, formats, _read_headers(path, files, formats, notes), notes)
        if not self.items:
            raise ValueError(f"{str(path)!r} holds no images ({', '.join(sorted(SUFFIXES))})")


def _chosen_files(
    path: Path, reader: FileReader, listed: Sequence[str] | None, notes: list[str]
) -> tuple[list[FileSource], list[Format]]:
    """The files of the commonest kind."""
    candidates: list[tuple[str, Format]] = []
    others: Counter[str] = Counter()
    alone = isinstance(reader, LoneFile)
    names = [name for name in reader.names() if not is_hidden(name)] if listed is None else []
    masks = beside_images(names)
    if masks:
        notes.append(f"{str(path)!r}: {len(masks)} files in folders of masks or annotations, beside images, are left aside")
        names = [name for name in names if name not in masks]
    for name in listed or sorted(names, key=lambda name: PurePosixPath(name).parts):
        kind = format_of(name)
        if kind is None and may_be_dicom(name) and is_dicom(_begin_of(name, reader)):
            kind = DICOM
        if kind is not None:
            candidates.append((name, kind))
        else:
            others[PurePosixPath(name).suffix.lower()] += 1
    counts = Counter(kind.name for _, kind in candidates)
    if not counts:
        usual = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in others.most_common(3))
        among = f" among its files: {usual}" if usual else ""
        raise ValueError(f"{str(path)!r} holds no images ({', '.join(sorted(SUFFIXES))}){among}")
    chosen = counts.most_common(1)[0][0]
    aside = [f"{count} {name}" for name, count in counts.items() if name != chosen]
    aside += [f"{count} {suffix} files" for suffix, count in others.items() if suffix in UNREAD]
    if aside:
        notes.append(f"{str(path)!r}: its {counts[chosen]} {chosen} are taken, and {', '.join(aside)} left aside")
    taken = [(name, kind) for name, kind in candidates if kind.name == chosen]
    return [FileSource(name, reader, alone) for name, _ in taken], [kind for _, kind in taken]


def _begin_of(name: str, reader: FileReader) -> bytes:
    """The first bytes of a file; none for a link that leads nowhere."""
    path = reader.path_of(name)
    return b"" if path is not None and not path.exists() else FileSource(name, reader).begins(132)


def _read_headers(path: Path, files: Sequence[FileSource], formats: Sequence[Format], notes: list[str]) -> list[Header]:
    headers, unreadable = [], []
    for source, kind in zip(files, formats, strict=True):
        try:
            headers.append(Header() if kind.header is None else kind.header(source))
        except Exception as error:  # a damaged file makes its library raise anything
            unreadable.append(f"{source.name} ({reason_of(error)})")
    if unreadable:
        raise ValueError(unreadable_message(path, unreadable, len(files)))
    empty = sum(header.frames == 0 for header in headers)
    if empty and empty < len(headers):
        notes.append(f"{str(path)!r}: {empty} of {len(headers)} files hold no images")
    remarks = Counter(header.remark for header in headers if header.remark)
    for remark, count in remarks.most_common(3):
        notes.append(f"{str(path)!r}: {'an array is' if count == 1 else f'{count} arrays are'} read {remark}")
    return headers


def _numbered(labels: Sequence[int | str]) -> Tensor | None:
    """Classes (N,) integers: whole numbers as they are, texts by their order; None if most texts differ, or one is negative."""
    if not any(isinstance(label, str) for label in labels):
        return None if any(int(label) < 0 for label in labels) else torch.tensor(labels)
    places = {text: place for place, text in enumerate(sorted({str(label) for label in labels}))}
    return torch.tensor([places[str(label)] for label in labels]) if 2 * len(places) <= len(labels) else None


def _matched(expression: str, name: str) -> str:
    try:
        match = re.search(expression, name)
    except re.error as error:
        raise ValueError(
            f"group_by is {expression!r}; expected {', '.join(GROUP_BY)}, or a regular expression on names ({error})"
        ) from None
    return "" if match is None else match.group(1) or "" if match.re.groups else match.group(0)


def _listed_labels(reader: FileReader) -> dict[str, int] | None:
    """Classes by name from a `dataset.json` of the StyleGAN and EDM family; None without one."""
    if EDM_LABELS not in reader.names():
        return None
    try:
        listed = json.loads(reader.read(EDM_LABELS)).get("labels")
        return {str(name): int(label) for name, label in listed} if listed else None
    except (ValueError, TypeError, AttributeError):
        return None


def reason_of(error: Exception) -> str:
    """Why a file cannot be read, in a line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def unreadable_message(path: Path, unreadable: Sequence[str], total: int) -> str:
    """The line that names files that cannot be read."""
    return f"{str(path)!r}: {len(unreadable)} of {total} images cannot be read: {named(unreadable)}"


def named(names: Sequence[str]) -> str:
    """The first few names, and the number of the others; names with unprintable characters are escaped."""
    names = [name if name.isprintable() else ascii(name)[1:-1] for name in names]
    rest = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{'; '.join(names[:MOST_NAMED])}{rest}"


def is_archive(path: Path | str) -> bool:
    """Whether a path is that of a zip."""
    return Path(path).suffix.lower() == ".zip" and Path(path).is_file()


def holds_images(path: Path | str) -> bool:
    """Whether a path is one that `ImageFiles` takes: a folder, an archive, or a file of a known format."""
    path = Path(path)
    return path.is_dir() or (path.is_file() and (is_archive(path) or format_of(path.name) is not None))


def is_hidden(name: str) -> bool:
    """Whether a file was added by a system (`.DS_Store`, `__MACOSX/`, `@eaDir/`, `._image.png`), and is no image."""
    return any(part.startswith(".") or part in ("__MACOSX", "@eaDir") for part in PurePosixPath(name).parts)


def image_paths(folder: Path | str) -> list[Path]:
    """All image files (PNG, JPEG, WebP, BMP, GIF, TIFF) below a folder, in the order of their paths; none without a folder."""
    names = Folder(Path(folder)).names() if Path(folder).is_dir() else []
    images = [name for name in names if PurePosixPath(name).suffix.lower() in RASTER_SUFFIXES and not is_hidden(name)]
    paths = [Path(folder) / name for name in sorted(images, key=lambda name: PurePosixPath(name).parts)]
    return [path for path in paths if path.exists()]  # a link may lead nowhere


def folder_labels(folder: Path | str) -> Tensor | None:
    """The class of each image of a folder, an archive or a file, (N,) integers, as `ImageFiles.labels`."""
    return ImageFiles(folder).labels()


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

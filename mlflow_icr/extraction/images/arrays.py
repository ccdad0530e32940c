""".npy and .npz: arrays of one image or of many; nothing is unpickled."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from mlflow_icr.extraction.images.archives import check_member
from mlflow_icr.extraction.images.picture import Picture
from mlflow_icr.extraction.images.sources import FileSource, Header

MOST_CHANNELS = 4  # an axis of at most this size counts as channels, since a shape does not name its axes
LABELS = ("labels", "label", "y", "targets", "target")
PREFERRED = ("images", "image", "x", "data", "arr_0")


def axes_of(shape: tuple[int, ...], alone: bool) -> tuple[str, str]:
    """The axes of an array, N images, height H, width W and C channels, and a remark where they are a guess.

    Raises ValueError for a shape that cannot be images.
    """
    match shape:
        case (_, _):
            return "HW", ""
        case (n, _, c) if not alone and c <= MOST_CHANNELS:
            return "HWC", "one image, channels last"
        case (c, _, _) if not alone and c <= MOST_CHANNELS:
            return "CHW", "one image, channels first"
        case (n, _, _):
            return "NHW", f"{n} grey images"
        case (n, a, _, b) if b <= MOST_CHANNELS < a:
            return "NHWC", ""
        case (n, a, _, b) if a <= MOST_CHANNELS < b:
            return "NCHW", ""
        case (n, a, _, b):
            return ("NCHW", f"{n} images, channels first") if a < b else ("NHWC", f"{n} images, channels last")
    raise ValueError(f"an array of shape {shape}; expected 2 to 4 dimensions")


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which would have to be unpickled (allow_pickle=False)")
    return shape, dtype


@dataclass(frozen=True)
class _Choice:
    """A .npz file's images, its labels, and its other arrays that could be images, by name."""

    images: str
    labels: str | None
    others: tuple[str, ...]


def _chosen(archive: zipfile.ZipFile) -> _Choice:
    """The arrays to read from a .npz file. Raises ValueError where none can be images."""
    for info in archive.infolist():
        check_member(info)
    shapes, objects = dict[str, tuple[int, ...]](), ""
    for name in (info.filename for info in archive.infolist() if info.filename.endswith(".npy")):
        with archive.open(name) as file:
            try:
                shapes[name.removesuffix(".npy")] = _read_header(file)[0]
            except ValueError as error:  # an array of Python objects, beside the images
                objects = f" ({name.removesuffix('.npy')}: {error})"
    images = [name for name, shape in shapes.items() if len(shape) >= 3]
    images = images or [name for name, shape in shapes.items() if len(shape) == 2]
    if not images:
        raise ValueError(f"no array of images among {', '.join(shapes) or 'none'}{objects}")
    training = [name for name in images if "train" in name.lower()]
    first = next((name for name in PREFERRED if name in images), (training or images)[0])
    paired = [first.replace("images", "labels"), first.replace("image", "label"), re.sub("^x|x$", "y", first)]
    count = shapes[first][0]
    labels = [name for name in (*paired, *LABELS) if name != first and shapes.get(name) in ((count,), (count, 1))]
    return _Choice(first, labels[0] if labels else None, tuple(name for name in images if name != first))


def _header_of(
    shape: tuple[int, ...], dtype: np.dtype[Any], alone: bool, labels: Sequence[Any] | None = None, taken: str = ""
) -> Header:
    axes, guess = axes_of(shape, alone)
    frames = shape[0] if axes.startswith("N") else 1
    remark = taken + (f"{shape} as {guess}" if guess else str(shape) if taken else "")
    return Header(frames, dtype.kind == "b" or dtype == np.uint8, labels=labels, remark=remark)


def _is_npz(source: FileSource) -> bool:
    return source.name.lower().endswith(".npz")


def header(source: FileSource) -> Header:
    """How many images an array holds, and their classes where a .npz file has an array of them."""
    with source.open() as file:
        if not _is_npz(source):
            return _header_of(*_read_header(file), source.alone)
        with zipfile.ZipFile(file) as archive:
            choice = _chosen(archive)
            with archive.open(f"{choice.images}.npy") as member:
                shape, dtype = _read_header(member)
        labels = None
        if choice.labels is not None:
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                labels = arrays[choice.labels].reshape(-1)
            labels = labels.tolist() if labels.dtype.kind in "uiU" else None
    taken = f"from {choice.images!r}, and not from {', '.join(choice.others)}: " if choice.others else ""
    return _header_of(shape, dtype, source.alone, labels, taken)


def _array(source: FileSource) -> np.ndarray:
    """A file's images: mapped where the array lies in the file as it is, else read."""
    if not _is_npz(source):
        return np.load(source.open() if source.path is None else source.path, mmap_mode="r" if source.path else None)
    with source.open() as file, zipfile.ZipFile(file) as archive:
        name = _chosen(archive).images
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return arrays[name]


def pictures(source: FileSource, frames: Sequence[int], background: str) -> Iterator[Picture]:
    """The images with these numbers."""
    values = _array(source)
    axes, _ = axes_of(values.shape, source.alone)
    for number in frames:
        image = values[number] if axes.startswith("N") else values
        order = axes.removeprefix("N")
        image = image[..., None] if order == "HW" else np.moveaxis(image, order.index("C"), -1)
        yield Picture(np.array(image.astype(image.dtype.newbyteorder("=")), order="C"))

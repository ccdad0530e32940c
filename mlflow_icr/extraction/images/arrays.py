""".npy and .npz: arrays of one image or of many; nothing is unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from mlflow_icr.extraction.images.archives import check_member
from mlflow_icr.extraction.images.picture import Picture
from mlflow_icr.extraction.images.sources import FileSource, Header

MOST_CHANNELS = 4  # of an image, where an array's shape does not say what its axes are
LABELS = ("labels", "label", "y", "targets", "target")
PREFERRED = ("images", "image", "x", "data", "arr_0")


def axes_of(shape: tuple[int, ...], alone: bool) -> tuple[str, str]:
    """What the axes of an array are, of N images, height H, width W and C channels; and a remark where that was a guess.

    Raises ValueError for a shape that can be no images.
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


def _chosen(archive: zipfile.ZipFile) -> tuple[str, str | None]:
    """The names of a .npz file's images and of its labels."""
    names = [info.filename for info in archive.infolist() if info.filename.endswith(".npy")]
    for info in archive.infolist():
        check_member(info)
    shapes = {}
    for name in names:
        with archive.open(name) as file:
            shapes[name.removesuffix(".npy")] = _read_header(file)[0]
    images = [name for name, shape in shapes.items() if len(shape) >= 3] or [
        n for n, shape in shapes.items() if len(shape) == 2
    ]
    if not images:
        raise ValueError(f"no array of images among {', '.join(shapes) or 'none'}")
    first = next((name for name in PREFERRED if name in images), images[0])
    return first, next((name for name in LABELS if name in shapes and shapes[name] == shapes[first][:1]), None)


def _header_of(shape: tuple[int, ...], dtype: np.dtype[Any], alone: bool, labels: Sequence[int] | None = None) -> Header:
    axes, remark = axes_of(shape, alone)
    frames = shape[0] if axes.startswith("N") else 1
    return Header(frames, dtype.kind == "b" or dtype == np.uint8, labels=labels, remark=remark and f"{shape} as {remark}")


def header(source: FileSource) -> Header:
    """How many images an array holds, and their classes where a .npz file has an array of them."""
    with source.open() as file:
        if not source.name.endswith(".npz"):
            return _header_of(*_read_header(file), source.alone)
        with zipfile.ZipFile(file) as archive:
            name, labels_name = _chosen(archive)
            with archive.open(f"{name}.npy") as member:
                shape, dtype = _read_header(member)
        labels = None
        if labels_name is not None:
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                labels = arrays[labels_name]
            labels = [int(v) for v in labels] if labels.dtype.kind in "ui" else None
    return _header_of(shape, dtype, source.alone, labels)


def _array(source: FileSource) -> np.ndarray:
    """A file's images: mapped where the array lies in the file as it is, else read."""
    if not source.name.endswith(".npz"):
        return np.load(source.open() if source.path is None else source.path, mmap_mode="r" if source.path else None)
    with source.open() as file, zipfile.ZipFile(file) as archive:
        name, _ = _chosen(archive)
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

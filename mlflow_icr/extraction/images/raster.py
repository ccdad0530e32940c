"""Images from disk: folders of image files as one uint8 tensor."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mlflow_icr.extraction.images.listing import SUFFIXES, ImageFiles, image_paths

# What Pillow, an archive or a damaged file may raise.
UNREADABLE = (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
MOST_NAMED = 10  # files that cannot be read, in one line
GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F"}


def fit(image: Image.Image, resolution: int) -> Image.Image:
    """The largest centred square of an image at resolution x resolution, area-averaged when it shrinks."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if side == resolution:
        return image.crop(box)
    method = Image.Resampling.BOX if side > resolution and side % resolution == 0 else Image.Resampling.LANCZOS
    return image.resize((resolution, resolution), method, box=box)


def as_eight_bit(image: Image.Image, grey: bool) -> Image.Image:
    """An image in mode L or RGB; 16-bit grey is scaled to 8 bits, not cut off."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    return image.convert("L" if grey else "RGB")


def stack_images(images: Iterable[Image.Image], resolution: int) -> Tensor:
    """PIL images as (N, C, resolution, resolution) uint8: one channel when all are grey, else RGB."""
    opened = list(images)
    grey = all(image.mode in GREY_MODES for image in opened)
    arrays = [np.asarray(fit(as_eight_bit(image, grey), resolution)) for image in opened]
    stacked = torch.from_numpy(np.stack(arrays))
    return stacked[:, None] if grey else stacked.permute(0, 3, 1, 2).contiguous()


def with_channels(images: Tensor, channels: int | None) -> Tensor:
    """Images (N, C, H, W) as a network of so many channels takes them: grey ones are repeated; None takes them as they are.

    Raises ValueError for any other number of channels.
    """
    if channels is None or images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1).contiguous()
    raise ValueError(f"data has {images.shape[1]} channels, and the network takes {channels}")


def load_folder(folder: Path | str, resolution: int) -> Tensor:
    """All images below a folder, or in a zip, in the order of their names, (N, C, resolution, resolution) uint8.

    Raises ValueError when there are none, or naming the files that cannot be read.
    """
    files = ImageFiles(folder)
    return read_listed(files, files.names, resolution)


def read_listed(files: ImageFiles, names: Sequence[str], resolution: int) -> Tensor:
    """Some image files as (N, C, resolution, resolution) uint8: one channel when all are grey, else RGB.

    One file is in memory at a time, whatever its size. Raises ValueError naming the files that cannot be read.
    """
    arrays, unreadable, grey = [], [], True
    for name in names:
        try:
            with Image.open(io.BytesIO(files.read(name))) as image:
                grey = grey and image.mode in GREY_MODES
                arrays.append(np.asarray(fit(as_eight_bit(image, grey), resolution)))
        except UNREADABLE as error:
            unreadable.append(f"{name} ({error})")
    if unreadable:
        raise ValueError(
            f"data is {str(files.path)!r}: {len(unreadable)} of {len(names)} images cannot be read: {named(unreadable)}"
        )
    if not grey:  # those before the first of colour were read as grey
        arrays = [array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2) for array in arrays]
    stacked = torch.from_numpy(np.stack(arrays))
    return stacked[:, None] if grey else stacked.permute(0, 3, 1, 2).contiguous()


def named(unreadable: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(unreadable) - MOST_NAMED} more" if len(unreadable) > MOST_NAMED else ""
    return f"{'; '.join(unreadable[:MOST_NAMED])}{more}"


def _open_all(sources: Iterable[tuple[str, Path | IO[bytes]]]) -> tuple[list[Image.Image], list[str]]:
    """Images, and the names of those that cannot be read with the reason."""
    images, unreadable = [], []
    for name, source in sources:
        try:
            with Image.open(source) as image:
                image.load()
                images.append(image.copy())
        except UNREADABLE as error:
            unreadable.append(f"{name} ({error})")
    return images, unreadable


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images (N, C, side, side) uint8 that somebody made, and the names of those that could not be read, with the reason."""

    images: Tensor
    unreadable: list[str]


def read_images(path: Path | str, resolution: int | None = None) -> ImageSet:
    """The images of a folder, of a `.zip` of image files, or of a `.npz` whose first array is one of images.

    Arrays are (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W), uint8; files are taken in the order of their names. Larger
    ones are cropped to a square and shrunk to `resolution`; without one all must have the same side already. Nothing is
    unpickled. Raises ValueError when there are no images, sides differ, or an array is not of uint8.
    """
    path = Path(path)
    if path.suffix == ".npz" and path.is_file():
        return ImageSet(_fitted(_from_arrays(path), path, resolution), [])
    if path.suffix == ".zip" and path.is_file():
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if Path(name).suffix.lower() in SUFFIXES)
            images, unreadable = _open_all((name, io.BytesIO(archive.read(name))) for name in names)
    elif path.is_dir():
        images, unreadable = _open_all((str(found), found) for found in image_paths(path))
    else:
        raise ValueError(f"{str(path)!r} is neither a folder, nor a .zip or .npz file of images")
    if not images:
        why = f"; {len(unreadable)} cannot be read: {named(unreadable)}" if unreadable else ""
        raise ValueError(f"{str(path)!r} holds no images ({', '.join(sorted(SUFFIXES))}){why}")
    return ImageSet(_fitted(images, path, resolution), unreadable)


def _from_arrays(path: Path) -> list[Image.Image]:
    with np.load(path, allow_pickle=False) as arrays:
        values = arrays[arrays.files[0]]
    if values.ndim == 4 and values.shape[1] in (1, 3) and values.shape[3] not in (1, 3):
        values = values.transpose(0, 2, 3, 1)
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.dtype != np.uint8 or values.ndim not in (3, 4) or (values.ndim == 4 and values.shape[3] != 3) or not len(values):
        raise ValueError(
            f"{str(path)!r} holds {values.dtype} {values.shape}; expected uint8 (N, H, W), (N, H, W, 3) or (N, 3, H, W)"
        )
    return [Image.fromarray(image) for image in values]


def _fitted(images: Sequence[Image.Image], path: Path, resolution: int | None) -> Tensor:
    if resolution is None:
        sizes = sorted({image.size for image in images})
        if len(sizes) > 1 or sizes[0][0] != sizes[0][1]:
            shown = ", ".join(f"{width}x{height}" for width, height in sizes[:5])
            raise ValueError(f"{str(path)!r} holds images of {shown} pixels; expected squares of one size, or --resolution")
        resolution = sizes[0][0]
    return stack_images(images, resolution)


def read_files(paths: Sequence[Path | str], resolution: int | None = None) -> ImageSet:
    """The images of these files, in this order, fitted as `read_images` does. Raises ValueError likewise."""
    images, unreadable = _open_all((str(path), Path(path)) for path in paths)
    if not images:
        raise ValueError(f"{len(paths)} files hold no images; {len(unreadable)} cannot be read: {named(unreadable)}")
    return ImageSet(_fitted(images, Path(paths[0]).parent, resolution), unreadable)


def content_hash(images: Tensor) -> str:
    """SHA-256 of the images' dtype, shape and pixels: the same exactly for the same images (N, C, H, W) in the same order."""
    kind = "" if images.dtype == torch.uint8 else str(images.dtype)  # images mostly are, and hashes of earlier runs stay
    digest = hashlib.sha256(f"{kind}{tuple(images.shape)}".encode())
    digest.update(images.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class FolderFacts:
    """What image files a folder holds: SHA-256 of their names and bytes, how many of each size and mode, and the unreadable."""

    sha256: str
    num_images: int
    num_bytes: int
    sizes: dict[str, int]  # WIDTHxHEIGHT
    modes: dict[str, int]  # as Pillow names them
    unreadable: list[str]


def folder_facts(folder: Path | str) -> FolderFacts:
    """The facts of the image files below a folder, from their bytes and headers; the order they are listed in does not matter.

    Raises ValueError when there are none.
    """
    folder = Path(folder)
    files = sorted((path.relative_to(folder).as_posix(), path) for path in image_paths(folder))
    if not files:
        raise ValueError(f"{str(folder)!r} is not a folder with images ({', '.join(sorted(SUFFIXES))})")
    digest, num_bytes, unreadable = hashlib.sha256(), 0, []
    sizes: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    for name, path in files:
        content = path.read_bytes()
        # Of fixed length each, so that no name can pass for another file's content.
        digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
        num_bytes += len(content)
        try:
            with Image.open(io.BytesIO(content)) as image:
                sizes[f"{image.width}x{image.height}"] += 1
                modes[image.mode] += 1
        except UNREADABLE:
            unreadable.append(name)
    return FolderFacts(digest.hexdigest(), len(files) - len(unreadable), num_bytes, dict(sizes), dict(modes), unreadable)

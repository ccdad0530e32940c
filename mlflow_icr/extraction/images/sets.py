"""Sets of images from elsewhere: read unchanged, hashed and described."""

from __future__ import annotations

import hashlib
import io
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlflow_icr.extraction.hashing import update_digest
from mlflow_icr.extraction.images.formats import RASTER_SUFFIXES
from mlflow_icr.extraction.images.listing import ImageFiles, holds_images, image_paths
from mlflow_icr.extraction.images.picture import Size, fit, height_width
from mlflow_icr.extraction.images.raster import GREY_MODES, open_image, over_background
from mlflow_icr.extraction.images.reading import Reading, first_size, read_items

logger = logging.getLogger(__name__)


def stack_images(images: Iterable[Image.Image], resolution: Size) -> Tensor:
    """PIL images of 8 bits as (N, C, H, W) uint8: one channel when all are grey, else RGB; transparency shows white."""
    opened = list(images)
    grey = all(image.mode in GREY_MODES for image in opened)
    arrays = [
        np.asarray(fit(over_background(image, "white")[0].convert("L" if grey else "RGB"), resolution)) for image in opened
    ]
    stacked = torch.from_numpy(np.stack(arrays))
    return stacked[:, None] if grey else stacked.permute(0, 3, 1, 2).contiguous()


def with_channels(images: Tensor, channels: int | None) -> Tensor:
    """Images (N, C, H, W) with a network's number of channels: grey ones are repeated; None leaves them as they are.

    Raises ValueError for any other number of channels.
    """
    if channels is None or images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1).contiguous()
    raise ValueError(f"data has {images.shape[1]} channels, and the network takes {channels}")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images (N, C, H, W), as `Read.images`, and the names of those that could not be read, with the reason."""

    images: Tensor
    unreadable: list[str]


def read_images(path: Path | str, resolution: Size | None = None) -> ImageSet:
    """The images of a folder, of a `.zip`, or of a file of images or arrays (`.npz`: its array of images).

    Arrays are (N, H, W), (N, H, W, C) or (N, C, H, W). Larger images are cropped and shrunk to `resolution`;
    without one all must have the same side already. Nothing is unpickled. Raises ValueError when there are no images, or sides
    differ.
    """
    if not holds_images(path):
        raise ValueError(f"{str(path)!r} is neither a folder, nor a .zip or .npz file of images")
    return _read(ImageFiles(path), resolution)


def read_files(paths: Sequence[Path | str], resolution: Size | None = None) -> ImageSet:
    """The images of these files, in this order, fitted as `read_images` does. Raises ValueError in the same cases."""
    if not paths:
        raise ValueError("no files are given; expected paths of images")
    return _read(ImageFiles(Path(paths[0]).parent, [str(path) for path in paths]), resolution)


def _read(files: ImageFiles, resolution: Size | None) -> ImageSet:
    items = range(len(files))
    size = (first_size(files)[0],) * 2 if resolution is None else height_width(resolution)
    read = read_items(files, items, Reading(size))
    if resolution is None and (len(read.sizes) > 1 or any(len(set(size)) > 1 for size in read.sizes)):
        shown = ", ".join(f"{width}x{height}" for height, width in sorted(read.sizes, key=lambda size: size[::-1])[:5])
        raise ValueError(f"{str(files.path)!r} holds images of {shown} pixels; expected squares of one size, or --resolution")
    for note in read.notes:
        logger.warning(note)
    return ImageSet(read.images, read.unreadable)


def content_hash(images: Tensor) -> str:
    """SHA-256 of the images' dtype, shape and pixels: the same exactly for the same images (N, C, H, W) in the same order."""
    kind = "" if images.dtype == torch.uint8 else str(images.dtype)  # uint8 adds nothing: hashes of earlier runs stay valid
    digest = hashlib.sha256(f"{kind}{tuple(images.shape)}".encode())
    update_digest(digest, images)
    return digest.hexdigest()


@dataclass(frozen=True)
class FolderFacts:
    """Facts on a folder's image files: SHA-256 of names and bytes, the number of each size and mode, and unreadable files."""

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
        raise ValueError(f"{str(folder)!r} is not a folder with images ({', '.join(sorted(RASTER_SUFFIXES))})")
    digest, num_bytes, unreadable = hashlib.sha256(), 0, []
    sizes: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    for name, path in files:
        content = path.read_bytes()
        # Both digests have a fixed length, so that no name can pass for content.
        digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
        num_bytes += len(content)
        try:
            with open_image(io.BytesIO(content)) as image:
                sizes[f"{image.width}x{image.height}"] += 1
                modes[image.mode] += 1
        except Exception:  # a damaged file makes Pillow raise anything
            unreadable.append(name)
    return FolderFacts(digest.hexdigest(), len(files) - len(unreadable), num_bytes, dict(sizes), dict(modes), unreadable)

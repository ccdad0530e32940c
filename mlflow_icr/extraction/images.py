"""Images from disk: folders of image files as one uint8 tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
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


def image_paths(folder: Path | str) -> list[Path]:
    """All image files below a folder, in the order of their paths."""
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def folder_labels(folder: Path | str) -> Tensor | None:
    """The class of each image of a folder, (N,) integers, where the images lie in one subfolder for each class; else None."""
    folder = Path(folder)
    names = [path.relative_to(folder).parts[:-1] for path in image_paths(folder)]
    classes = sorted({parts[0] for parts in names if parts})
    if len(classes) < 2 or not all(names):
        return None
    return torch.tensor([classes.index(parts[0]) for parts in names])


def load_folder(folder: Path | str, resolution: int) -> Tensor:
    """All images below a folder, in the order of their paths, (N, C, resolution, resolution) uint8.

    Raises ValueError when there are none, or naming the files that cannot be read.
    """
    paths = image_paths(folder)
    if not paths:
        raise ValueError(f"data is {str(folder)!r}, a folder without images ({', '.join(sorted(SUFFIXES))})")
    images, unreadable = [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
                images.append(image.copy())
        except (UnidentifiedImageError, OSError) as error:
            unreadable.append(f"{path} ({error})")
    if unreadable:
        more = f" and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        raise ValueError(f"{len(unreadable)} of {len(paths)} images cannot be read: {'; '.join(unreadable[:5])}{more}")
    return stack_images(images, resolution)


def content_hash(images: Tensor) -> str:
    """SHA-256 of the images' shape and pixels, (N, C, H, W) uint8: the same exactly for the same images in the same order."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(images.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

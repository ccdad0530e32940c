"""One image as it is in its file, and how it is cropped and scaled to a size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

Span = tuple[float, float]  # the values that become black and white
Size = int | tuple[int, int]  # a side in pixels, or (height, width)
# Blank images are packed several hundred to one: up to 64 MiB that is harmless, and larger images are never packed so.
UNSUSPICIOUS_BYTES, MOST_RATIO = 64 * 2**20, 200


@dataclass(frozen=True, eq=False)
class Picture:
    """One image, values (H, W, C) as its file has them; uint8 are black at 0 and white at 255.

    For other types, `stated` is the range of values that the file states, or None. `over` is whether parts were transparent,
    and were laid over the background; `animated` is whether more pictures follow in an animation.
    """

    values: np.ndarray
    stated: Span | None = None
    over: bool = False
    animated: bool = False

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or not self.values.size:
            raise ValueError(f"an image of shape {self.values.shape}; expected (height, width, channels)")
        if self.values.dtype.kind == "b":
            object.__setattr__(self, "values", self.values.astype(np.uint8) * 255)
        if self.values.dtype.kind not in "uif":
            raise ValueError(f"values of type {self.values.dtype}; expected whole numbers or floats")
        if self.values.dtype.kind == "f" and not np.isfinite(self.values).all():
            raise ValueError("some of its values are NaN or infinite")

    @property
    def plain(self) -> bool:
        """Whether its values are bytes, with black at 0 and white at 255."""
        return self.values.dtype == np.uint8


def height_width(size: Size) -> tuple[int, int]:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else size


def parse_size(text: str | int) -> Size:
    """A side, or (height, width) from HEIGHTxWIDTH; a square has a side. Raises ValueError for anything else."""
    parts = str(text).lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"resolution is {text!r}; expected a side in pixels, or HEIGHTxWIDTH")
    height, width = int(parts[0]), int(parts[-1])
    return height if height == width else (height, width)


def refuse_bomb(decoded_bytes: int, stored_bytes: int) -> None:
    """Raise ValueError for a small file that claims to hold a huge image, before memory is taken for it."""
    if decoded_bytes > max(UNSUSPICIOUS_BYTES, MOST_RATIO * stored_bytes):
        ratio = decoded_bytes / max(1, stored_bytes)
        raise ValueError(
            f"packed {ratio:.0f} to 1, {decoded_bytes / 2**20:.0f} MiB, as no image is; expected {MOST_RATIO} to 1"
        )


def crop_box(width: int, height: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest centred part of an image with the proportions of `size`, (height, width)."""
    scale = min(height / size[0], width / size[1])
    box_width, box_height = scale * size[1], scale * size[0]
    if abs(box_width - round(box_width)) < 1e-6:  # whole pixels stay whole: 3 / 7 * 7 is not 3
        box_width = round(box_width)
    if abs(box_height - round(box_height)) < 1e-6:
        box_height = round(box_height)
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, min(width, left + box_width), min(height, top + box_height)


def fit(image: Image.Image, size: Size) -> Image.Image:
    """The largest centred part of an image at a size, a side or (height, width).

    An image is shrunk by whole factors with area averages, else resized with Lanczos' filter.
    """
    height, width = height_width(size)
    box = crop_box(image.width, image.height, (height, width))
    box_width, box_height = box[2] - box[0], box[3] - box[1]
    if (box_width, box_height) == (width, height):
        return image.crop((int(box[0]), int(box[1]), int(box[2]), int(box[3])))
    whole = box_width % width == 0 and box_height % height == 0
    method = Image.Resampling.BOX if whole and box_width > width else Image.Resampling.LANCZOS
    return image.resize((width, height), method, box=box)


def fit_array(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Values (H, W, C), uint8 or float32, at a size, as `fit`; floats may overshoot their range, bytes do not."""
    height, width, channels = values.shape
    left, top, right, bottom = crop_box(width, height, size)
    if (bottom - top, right - left) == size:
        return values[int(top) : int(bottom), int(left) : int(right)]
    if values.dtype == np.uint8 and channels in (1, 3):
        image = Image.fromarray(values[..., 0] if channels == 1 else np.ascontiguousarray(values))
        return np.asarray(fit(image, size)).reshape(*size, channels)
    planes = [np.asarray(fit(Image.fromarray(np.ascontiguousarray(values[..., c])), size)) for c in range(channels)]
    return np.stack(planes, axis=-1)

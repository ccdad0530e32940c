"""Pictures of many small images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

CAPTION = 13  # pixels of a line of text
SMALLEST_TILE = 48  # pixels; 8x8 digits are enlarged by whole factors until they can be seen


def image_tiles(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) uint8 as (N, H', W', 3) uint8, enlarged by a whole factor until they can be seen.

    One channel is shown grey, three as RGB; any other number by its first channel. Raises ValueError for no images.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (N, C, H, W) with N >= 1")
    tiles = images.cpu().numpy().transpose(0, 2, 3, 1)  # (N, H, W, C)
    if tiles.shape[-1] != 3:
        tiles = tiles[..., :1].repeat(3, axis=-1)
    factor = max(1, -(-SMALLEST_TILE // max(tiles.shape[1:3])))
    return tiles.repeat(factor, axis=1).repeat(factor, axis=2)


def image_grid(images: Tensor, columns: int) -> np.ndarray:
    """One picture (H', W', 3) uint8 of images (N, C, H, W) uint8, row by row, with a thin white line between them.

    Raises ValueError for no images.
    """
    return tile_grid(image_tiles(images), columns)


def captioned(tiles: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Tiles (N, H, W, 3) uint8 with a line of text below each, (N, H + CAPTION, W, 3)."""
    from PIL import Image, ImageDraw

    lines = []
    for text in captions:
        line = Image.new("RGB", (tiles.shape[2], CAPTION), "white")
        ImageDraw.Draw(line).text((1, 0), text, fill="black")
        lines.append(np.asarray(line))
    return np.concatenate([tiles, np.stack(lines)], axis=1)


def tile_grid(tiles: np.ndarray, columns: int) -> np.ndarray:
    """One picture of tiles (N, H, W, 3) uint8, as `image_grid`."""
    count, height, width, _ = tiles.shape
    rows = -(-count // columns)
    picture = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, 3), 255, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        picture[top : top + height, left : left + width] = tile
    return picture

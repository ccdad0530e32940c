"""Pictures of many small images."""

from __future__ import annotations

import numpy as np
from torch import Tensor

SMALLEST_TILE = 48  # pixels; 8x8 digits are enlarged by whole factors until they can be seen


def image_tiles(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) uint8 as (N, H', W', 3) uint8, enlarged by a whole factor until they can be seen.

    One channel is shown grey, three as RGB; of any other number the first. Raises ValueError for no images.
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
    tiles = image_tiles(images)
    count, height, width, _ = tiles.shape
    rows = -(-count // columns)
    picture = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, 3), 255, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        picture[top : top + height, left : left + width] = tile
    return picture

"""Convert images of many types, as scripts log them, to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mlflow_icr.monitoring.grid import image_grid

CHANNELS = (1, 3, 4)
COLUMNS = 8


def _as_batch(image: Any) -> np.ndarray:
    """One image or a batch of images as (N, H, W, C) uint8. Raises ValueError for anything else."""
    if hasattr(image, "detach"):
        image = image.detach().cpu().float().numpy() if image.is_floating_point() else image.detach().cpu().numpy()
    if hasattr(image, "convert"):  # of PIL; palettes and masks are not pixels
        image = image.convert("RGB")
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4:
        raise ValueError(f"shape {array.shape}; expected (H, W), (H, W, C), (C, H, W) or a batch of these")
    if array.shape[-1] not in CHANNELS and array.shape[1] in CHANNELS:
        array = array.transpose(0, 2, 3, 1)
    if array.shape[-1] not in CHANNELS or 0 in array.shape:
        raise ValueError(f"shape {array.shape}; expected 1, 3 or 4 channels")
    if array.dtype != np.uint8:
        # As matplotlib reads them: floats are shares of white, integers grey values.
        scale = 255 if np.issubdtype(array.dtype, np.floating) or array.dtype == np.bool_ else 1
        array = (np.nan_to_num(array.astype(np.float64)) * scale).round().clip(0, 255).astype(np.uint8)
    return array[..., :3] if array.shape[-1] == 4 else array


def as_pictures(images: Any) -> list[np.ndarray]:
    """One uint8 picture (H, W, 3) of all images if they have one size, else one picture of each.

    Images are arrays and tensors, (H, W, C) or (C, H, W), or batches, uint8 or floats in [0, 1], PIL images, or lists of
    these. Raises ValueError for anything else.
    """
    many: Sequence[Any] = images if isinstance(images, (list, tuple)) else [images]
    if not many:
        raise ValueError("no images; expected at least one")
    batches = [_as_batch(image) for image in many]
    batches = [batch.repeat(3, -1) if batch.shape[-1] == 1 else batch for batch in batches]
    groups = [np.concatenate(batches)] if len({batch.shape[1:] for batch in batches}) == 1 else batches
    return [image_grid(torch.from_numpy(g).permute(0, 3, 1, 2), min(COLUMNS, len(g))) for g in groups]

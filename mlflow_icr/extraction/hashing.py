"""Hashes of images' bytes."""

from __future__ import annotations

import hashlib

import numpy as np
from torch import Tensor

HASHED_BYTES = 64 * 2**20  # at a time, so that a set is never in memory twice


def update_digest(digest: hashlib._Hash, images: Tensor) -> None:
    """Add the bytes of images (N, ...) to a hash, some at a time."""
    rows = max(1, HASHED_BYTES // max(1, images[:1].numel() * images.element_size()))
    for part in images.detach().split(rows):
        digest.update(part.cpu().contiguous().numpy().reshape(-1).view(np.uint8))

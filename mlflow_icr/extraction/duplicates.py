"""Exact duplicates among images, by their pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from mlflow_icr.extraction.hashing import update_digest


def pixel_hashes(images: Tensor) -> list[bytes]:
    """The SHA-256 of each image's pixels, of images (N, C, H, W)."""
    hashes = []
    for image in images:
        digest = hashlib.sha256()
        update_digest(digest, image[None])
        hashes.append(digest.digest())
    return hashes


def exact_duplicates(hashes: Sequence[bytes]) -> list[list[int]]:
    """Lists of indices of identical images, one list for each image that occurs more than once, ordered by the first index."""
    places: dict[bytes, list[int]] = {}
    for index, digest in enumerate(hashes):
        places.setdefault(digest, []).append(index)
    return [indices for indices in places.values() if len(indices) > 1]


def duplicate_notes(train: Tensor, heldout: Tensor) -> list[str]:
    """A line on duplicates among training images, if any, and one on held-out images that are training images too."""
    hashes = pixel_hashes(train)
    repeats = sum(len(indices) - 1 for indices in exact_duplicates(hashes))
    notes = []
    if repeats:
        notes.append(f"{repeats} of {len(train)} training images are exact duplicates of others; see mlflow-icr duplicates")
    shared = len(set(hashes).intersection(pixel_hashes(heldout)))
    if shared:
        notes.append(f"{shared} training images are held out too, by exact copies; loss/heldout is too low for it")
    return notes

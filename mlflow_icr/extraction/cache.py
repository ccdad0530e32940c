"""A cache on disk for embeddings of real images, which are computed once and read by later runs.

A file's name is the SHA-256 of the pixels and the identity of the encoder (weights and preprocessing). So whatever would change
an embedding also changes the file's name. The format is safetensors: nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mlflow_icr.extraction.encoders import Encoder
from mlflow_icr.extraction.files import CACHE_VARIABLE, write_whole
from mlflow_icr.extraction.hashing import update_digest
from mlflow_icr.generation import GaussianStatistics, Reference

logger = logging.getLogger(__name__)


class ReferenceCache:
    """References of image sets (N, C, H, W) by an encoder, read from `folder`, or computed and written there.

    If the folder cannot be written, there is one warning, and embeddings are computed each time. Pixels are their own embedding
    and are not kept.
    """

    def __init__(self, folder: Path | str | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def path(self, encoder: Encoder, images: Tensor) -> Path | None:
        """The file of a set and an encoder; None where nothing is kept."""
        if self.folder is None or encoder.name == "pixels":
            return None
        digest = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}".encode())
        update_digest(digest, images)
        return self.folder / f"{encoder.name}-{encoder.identity}" / f"{digest.hexdigest()}.safetensors"

    def find(self, encoder: Encoder, images: Tensor) -> Reference | None:
        """The kept reference of a set, or None; a file that is damaged, or of another shape, counts as none."""
        path = self.path(encoder, images)
        if path is None or not path.is_file():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(path.read_bytes())
            reference = Reference(tensors["embeddings"])
            statistics = GaussianStatistics(len(reference), tensors["mean"], tensors["root"])
            own_distances = tensors["own_distances"]
        except (SafetensorError, KeyError, OSError):
            return None
        expected = {"embeddings": (len(images), encoder.dim), "mean": (encoder.dim,), "own_distances": (len(images),)}
        intact = all(
            tuple(tensors[key].shape) == shape and bool(tensors[key].isfinite().all()) for key, shape in expected.items()
        )
        if not intact or statistics.root.shape != (min(tensors["embeddings"].shape), encoder.dim):
            return None
        reference.__dict__ |= {"gaussian": statistics, "own_distances": own_distances}  # else computed on first use
        return reference

    def keep(self, encoder: Encoder, images: Tensor, reference: Reference) -> None:
        """Write a set's reference, whole or not at all."""
        path = self.path(encoder, images)
        if path is None or len(reference) < 2:
            return
        from safetensors.torch import save

        tensors = {
            "embeddings": reference.embeddings,
            "mean": reference.gaussian.mean,
            "root": reference.gaussian.root,
            "own_distances": reference.own_distances,
        }
        content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
        try:
            write_whole(path, lambda file: file.write(content))
        except OSError as error:
            logger.warning(
                "embeddings are not kept in %s (%s); %s names another folder", self.folder, error.strerror, CACHE_VARIABLE
            )

    def reference(self, encoder: Encoder, images: Tensor, encode: Callable[[Tensor], Tensor] | None = None) -> Reference:
        """The reference of a set: read, or made by `encode` (the encoder itself unless given) and kept."""
        reference = self.find(encoder, images)
        if reference is None:
            with torch.no_grad():
                reference = Reference((encode or encoder)(images))
            self.keep(encoder, images, reference)
        return reference

"""Sharded tensors on disk: each rank writes its shares, by torch.distributed.checkpoint, as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


def write_shares(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write a state's tensors, of which this rank has shares; every rank must take part. Nothing is gathered."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(tensors, storage_writer=writer)


def read_entire(folder: Path) -> dict[str, Tensor]:
    """The tensors that ranks have written, entire, on the CPU; any number of ranks may read them, each for itself."""
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(tuple(entry.size), dtype=entry.properties.dtype) for name, entry in stored.items()}  # type: ignore[union-attr]
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors

"""Images read once on each node: one rank reads them into a file, and the others map it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from mlflow_icr.extraction.images import Read, Store
from mlflow_icr.extraction.images.store import mapped
from mlflow_icr.monitoring.ranks import world

PATIENCE = timedelta(days=1)  # for one rank to read, while others wait; NCCL's own ten minutes are too few for a slow disk


@dataclass(frozen=True)
class _Answer:
    """The file of the images, and everything else that was read."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rest: Read


def _without_images(read: Read) -> Read:
    return replace(read, images=torch.empty(0))


def _gathered(value: Any, group: Any) -> list[Any]:
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def once_a_node(read: Callable[[Store], Read], folder: Path | None) -> Read:
    """Call `read` once on each host, and return its result on every rank.

    The first rank of a host reads into a file in `folder`, which the others map. The file has no name any more when this
    returns, so that nothing is left over, however the ranks end. Raises, on all ranks, the ValueError or OSError of any.
    """
    if world()[1] == 1:
        return read(Store(folder))
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    hosts = _gathered(socket.gethostname(), group)
    reader = hosts.index(hosts[dist.get_rank()])
    store = Store(folder, shared=True)
    content = answer = failure = None
    if reader == dist.get_rank():
        try:
            content = read(store)
            assert store.path is not None
            answer = _Answer(store.path, tuple(content.images.shape), content.images.numpy().dtype, _without_images(content))
        except (ValueError, OSError) as error:
            failure = error
    failures = [error for error in _gathered(failure, group) if error is not None]
    answers = _gathered(answer, group)
    if not failures and content is None:
        source = answers[reader]
        content = replace(source.rest, images=torch.from_numpy(mapped(source.path, source.shape, source.dtype)))
    dist.barrier(group)
    store.forget()
    dist.destroy_process_group(group)
    if failures:
        raise failures[0]
    assert content is not None
    return content

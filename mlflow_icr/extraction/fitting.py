"""Batches that fit the memory: halved where it runs out; bounded beforehand on the CPU, where a program is killed instead."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from mlflow_icr.extraction.denoisers import Denoiser, device_of, evaluating

T = TypeVar("T")
logger = logging.getLogger(__name__)

# What allocators that have no exception of their own say; cuDNN has the last for a workspace that it does not get.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
SMALL = 3 * 64 * 64  # values of an image of which hundreds fit any machine
HOST_SHARE = 4  # one part in so many of the host's free memory is for activations


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of an allocator without memory, of any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


class FittingBatches:
    """Batches of at most `size`; where memory runs out the size is halved, and what worked is kept for the rest and later.

    Raises ValueError for a size below 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"batch_size is {size}; expected at least 1")
        self.size = size

    def over(self, count: int, work: Callable[[slice], T], *, each: int = 1) -> Iterator[T]:
        """`work` of consecutive slices of `count` rows, of which each counts as `each` in a batch; at least a row at a time.

        Raises what `work` raises, an allocator's error too when a single row does not fit.
        """
        start = 0
        while start < count:
            rows = slice(start, min(count, start + max(1, self.size // each)))
            found = self._attempt(rows, work, each)
            if found is not None:
                yield found[0]
                start = rows.stop

    def _attempt(self, rows: slice, work: Callable[[slice], T], each: int) -> tuple[T] | None:
        try:
            return (work(rows),)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or rows.stop - rows.start == 1:
                raise
        # Only here, where the error and the tensors of its frames are gone, is there memory again.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = max(1, (rows.stop - rows.start) * each // 2)
        logger.warning("memory ran out: batches of %d from here on", self.size)
        return None


def available_memory() -> int | None:
    """Bytes that the host has free, caches of files included; None where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        except (ValueError, OSError, AttributeError):
            return None


def activation_bytes(network: nn.Module, call: Callable[[], object]) -> int:
    """Bytes of everything that a network's innermost modules put out in a call: more than a pass without gradients keeps."""
    total = 0

    def count(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.numel() * output.element_size()

    hooks = [module.register_forward_hook(count) for module in network.modules() if not list(module.children())]
    try:
        with torch.no_grad(), evaluating(network):
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return total


def host_batch(denoiser: Denoiser, x: Tensor, size: int) -> int:
    """`size`, or fewer of images like x (1, C, H, W) where a denoiser runs on the CPU and would take too much of its memory."""
    free = available_memory()
    if device_of(denoiser).type != "cpu" or x.numel() < SMALL or free is None:
        return size
    return max(1, min(size, free // HOST_SHARE // max(1, activation_bytes(denoiser.network, lambda: denoiser(x, 1.0)))))

"""Batches that fit into memory: halved when memory runs out; limited in advance on the CPU, where a program would be killed."""

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

# Messages of allocators without an exception class of their own; the last is cuDNN's for a workspace.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")
SMALL = 3 * 64 * 64  # with fewer values in an image, hundreds of them fit any machine
HOST_SHARE = 4  # activations may take one part in so many of the host's free memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


class FittingBatches:
    """Batches of at most `size`. When memory runs out the size is halved; the smaller size stays for later batches.

    Raises ValueError for a size below 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"batch_size is {size}; expected at least 1")
        self.size = size

    def over(self, count: int, work: Callable[[slice], T], *, each: int = 1) -> Iterator[T]:
        """`work` of consecutive slices of `count` rows; a row counts as `each` in a batch, and a slice has at least one.

        Raises what `work` raises, an allocator's error too when a single row does not fit.
        """
        start = 0
        while start < count:
            rows = slice(start, min(count, start + max(1, self.size // each)))
            result = self._attempt(rows, work, each)
            if result is not None:
                yield result[0]
                start = rows.stop

    def _attempt(self, rows: slice, work: Callable[[slice], T], each: int) -> tuple[T] | None:
        try:
            return (work(rows),)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or rows.stop - rows.start == 1:
                raise
        # Memory is free again only here, after the error and the tensors of its frames are gone.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = max(1, (rows.stop - rows.start) * each // 2)
        logger.warning("memory ran out; continuing with batches of %d", self.size)
        return None


def available_memory() -> int | None:
    """Free bytes of the host's memory, file caches included; None where the system does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        except (ValueError, OSError, AttributeError):
            return None


def activation_bytes(network: nn.Module, call: Callable[[], object]) -> int:
    """Bytes of all outputs of a network's innermost modules in a call: an upper bound for a pass without gradients."""
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
    """`size`, or a smaller batch of images like x (1, C, H, W) if a denoiser on the CPU would take too much memory."""
    free = available_memory()
    if device_of(denoiser).type != "cpu" or x.numel() < SMALL or free is None:
        return size
    return max(1, min(size, free // HOST_SHARE // max(1, activation_bytes(denoiser.network, lambda: denoiser(x, 1.0)))))

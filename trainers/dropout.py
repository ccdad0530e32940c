"""Keyed dropout: a mask depends on an image's place in the training, not on ranks or accumulation.

torch's own dropout draws a mask from a device's generator, in the shape of a rank's batch. On another number of ranks, or with
other accumulation, the same image gets another mask. Here each row of a batch has a key. Whether an element stays is a hash of
the row's key, the layer and the element's place in the row. So it is the same on any device, however a batch is divided.

The hash is some thirty operations of one integer each. On CUDA they are compiled into one kernel with the dropout itself, and
into one more for its gradient (`fused`); elsewhere, and where there is no compiler, they are torch's own, with the same masks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# Multipliers and shifts of a mixer of 32 bits that was searched for its small bias (Wellons 2018, "lowbias32").
FIRST, SHIFT, SECOND, LAST_SHIFT = 0x7FEB352D, 15, 0x846CA68B - 2**32, 16
INCREMENT = 0x9E3779B9 - 2**32  # 2^32 over the golden ratio: successive places and layers are far apart before they are mixed


def _fold(words: Tensor, shift: int) -> Tensor:
    """int32 words with their upper bits brought down, in place; zeros come in from above."""
    return words.bitwise_xor_((words >> shift).bitwise_and_(2 ** (32 - shift) - 1))


def _mixed(words: Tensor) -> Tensor:
    """int32 words, mixed in place: each bit depends on all bits of the given word. Products wrap around."""
    return _fold(_fold(_fold(words, LAST_SHIFT).mul_(FIRST), SHIFT).mul_(SECOND), LAST_SHIFT)


class RowKeys:
    """The keys (B,) int64 of the next batch's rows, as the network's dropout layers read them."""

    def __init__(self) -> None:
        self.layers = 0
        self._keys: Tensor | None = None
        self._words: tuple[Tensor, Tensor] | None = None

    @property
    def of_rows(self) -> Tensor | None:
        """The keys (B,) int64; None before the first batch."""
        return self._keys

    @of_rows.setter
    def of_rows(self, keys: Tensor | None) -> None:
        self._keys, self._words = keys, None
        if keys is None or not self.layers:
            return
        # For all layers together, once a batch, and outside of compiled code.
        low, high = ((half & 0xFFFFFFFF).to(torch.int32)[None] for half in (keys, keys >> 32))
        layers = torch.arange(self.layers, dtype=torch.int32, device=keys.device).mul_(INCREMENT)[:, None]
        before = _mixed(_mixed(low + layers) + high)
        self._words = before, _mixed(before ^ low)

    def words(self, layer: int) -> tuple[Tensor, Tensor]:
        """Two int32 words (B,) of each row for a layer."""
        assert self._words is not None, "a network in training has keys for its rows"
        return self._words[0][layer], self._words[1][layer]


def kept(x: Tensor, before: Tensor, between: Tensor, p: float) -> Tensor:
    """A mask of the elements of x (B, ...) that stay, bool of x's shape and layout, by two words (B,) of each row."""
    count = x[0].numel()
    places = torch.arange(count, dtype=torch.int32, device=x.device).mul_(INCREMENT).view(1, *x.shape[1:])
    # In x's memory layout, as all that follows: mixing two layouts would cost more than the hash.
    places = _mixed(torch.empty_like(x[:1], dtype=torch.int32).copy_(places))
    before, between = (words.view(-1, *[1] * (x.dim() - 1)) for words in (before, between))
    # As few operations as possible for all elements: two rows share a mask only if they share both words.
    words = _fold((places ^ before).mul_(FIRST), SHIFT).add_(between).mul_(SECOND)
    return words >= round(p * 2**32) - 2**31


def dropped(x: Tensor, before: Tensor, between: Tensor, p: float) -> Tensor:
    """x (B, ...) with a share p of its elements zero and the others larger in proportion, by two words (B,) of each row."""
    return torch.where(kept(x, before, between, p), x / (1 - p), 0.0)


@cache
def fused(p: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`dropped` for a share p, compiled: one kernel forward and one backward, for any shape."""
    constant: Any = torch.compiler.assume_constant_result(lambda: p)  # else it is an input, which costs a kernel to convert

    def apply(x: Tensor, before: Tensor, between: Tensor) -> Tensor:
        return dropped(x, before, between, constant())

    return torch.compile(apply, dynamic=True)


@cache
def can_fuse(device_type: str) -> bool:
    """Whether there is a compiler for kernels of a device: on CUDA that is Triton, and on the CPU they are not worth one."""
    from torch.utils._triton import has_triton

    return device_type == "cuda" and has_triton()


class KeyedDropout(nn.Module):
    """Inverted dropout of x (B, ...) in training, by the B keys of its rows; in evaluation x itself."""

    def __init__(self, p: float, layer: int, keys: RowKeys) -> None:
        super().__init__()
        self.p, self.layer, self.keys = p, layer, keys

    def _words(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before, between = self.keys.words(self.layer)
        assert len(before) == len(x), (len(before), len(x))
        return before, between

    def kept(self, x: Tensor) -> Tensor:
        """A mask of the elements that stay, bool of x's shape and layout."""
        return kept(x, *self._words(x), self.p)

    def forward(self, x: Tensor) -> Tensor:
        """x with a share p of its elements zero and the others larger in proportion."""
        if not self.training:
            return x
        words = self._words(x)
        if torch.compiler.is_compiling() or not can_fuse(x.device.type):  # a compiled network fuses what it can itself
            return dropped(x, *words, self.p)
        return fused(self.p)(x, *words)

    def extra_repr(self) -> str:
        """The text inside repr."""
        return f"p={self.p}, layer={self.layer}"


def key_dropout(network: nn.Module) -> RowKeys:
    """Replace a network's dropout layers, which have no parameters, by keyed ones; returns the object that takes their keys."""
    keys = RowKeys()
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout) and child.p > 0:
                setattr(parent, name, KeyedDropout(child.p, keys.layers, keys).train(child.training))
                keys.layers += 1
    return keys

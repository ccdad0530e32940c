"""Dropout whose masks belong to an image's place in the training, not to a rank or a moment.

torch's own draws a mask from the generator of a device, in the shape of what a rank happens to have: on another number of ranks
or with other accumulation, the same image gets another mask. Here each row of a batch has a key, and what becomes of an element
is a hash of the row's key, the layer and the element's place in the row: the same on any device, however a batch is divided.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Multipliers and shifts of a mixer of 32 bits that was searched for its small bias (Wellons 2018, "lowbias32").
FIRST, SHIFT, SECOND, LAST_SHIFT = 0x7FEB352D, 15, 0x846CA68B - 2**32, 16
INCREMENT = 0x9E3779B9 - 2**32  # 2^32 over the golden ratio: successive places and layers are far apart before they are mixed


def _fold(words: Tensor, shift: int) -> Tensor:
    """int32 words with their upper bits brought down, in place; zeros come in from above."""
    return words.bitwise_xor_((words >> shift).bitwise_and_(2 ** (32 - shift) - 1))


def _mixed(words: Tensor) -> Tensor:
    """int32 words, each bit of which depends on all of the given one; in place. Products wrap around."""
    return _fold(_fold(_fold(words, LAST_SHIFT).mul_(FIRST), SHIFT).mul_(SECOND), LAST_SHIFT)


class RowKeys:
    """Where a network's dropout layers read the keys (B,) int64 of the rows that it is about to see."""

    def __init__(self) -> None:
        self.of_rows: Tensor | None = None


class KeyedDropout(nn.Module):
    """Inverted dropout of x (B, ...) in training, by the B keys of its rows; in evaluation x itself."""

    def __init__(self, p: float, layer: int, keys: RowKeys) -> None:
        super().__init__()
        self.p, self.layer, self.keys = p, layer, keys

    def kept(self, x: Tensor) -> Tensor:
        """Which elements stay, bool of x's shape and layout."""
        keys = self.keys.of_rows
        assert keys is not None, "a network in training has keys for its rows"
        assert len(keys) == len(x), (len(keys), len(x))
        count = x[0].numel()
        places = torch.arange(count, dtype=torch.int32, device=x.device).mul_(INCREMENT).view(1, *x.shape[1:])
        # In x's layout, which all that follows has: reading across two layouts would cost more than the hash.
        places = _mixed(torch.empty_like(x[:1], dtype=torch.int32).copy_(places))
        layer = (self.layer * INCREMENT + 2**31) % 2**32 - 2**31  # in int32
        low, high = ((half & 0xFFFFFFFF).to(torch.int32).view(-1, *[1] * (x.dim() - 1)) for half in (keys, keys >> 32))
        before = _mixed(_mixed(low + layer) + high)
        between = _mixed(before ^ low)
        # For all elements, as little as leaves none alike: two rows share a mask only where they share both words.
        words = _fold((places ^ before).mul_(FIRST), SHIFT).add_(between).mul_(SECOND)
        return words >= round(self.p * 2**32) - 2**31

    def forward(self, x: Tensor) -> Tensor:
        """x with a share p of its elements zero and the others larger in proportion."""
        if not self.training:
            return x
        return torch.where(self.kept(x), x / (1 - self.p), 0.0)

    def extra_repr(self) -> str:
        """What repr shows."""
        return f"p={self.p}, layer={self.layer}"


def key_dropout(network: nn.Module) -> RowKeys:
    """Replace a network's dropout layers, which have no parameters, by keyed ones; returns where their keys go."""
    keys, layer = RowKeys(), 0
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout) and child.p > 0:
                setattr(parent, name, KeyedDropout(child.p, layer, keys).train(child.training))
                layer += 1
    return keys

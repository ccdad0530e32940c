"""Networks with class labels, read with the label that means none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def null_class_of(network: nn.Module) -> int:
    """The label that stands for dropped labels in training a DiTTransformer2DModel: the one after its classes."""
    config: Any = network.config
    return int(config.num_embeds_ada_norm)


class ClassCondition:
    """Runs a class-conditional network with one label for all images."""

    def __init__(self, label: int) -> None:
        self.label = label

    def __call__(self, network: nn.Module, x: Tensor, time: Tensor) -> Any:
        """The network's output on x (B, C, H, W) at times (B,)."""
        labels = torch.full((len(x),), self.label, dtype=torch.long, device=x.device)
        return network(x, time, class_labels=labels)

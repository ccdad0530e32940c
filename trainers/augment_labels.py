"""Augmentation labels: a network in training gets them as an input; a saved network has no such input.

Nine numbers a row go through a linear layer without bias and are added to the embedding of time, before its first layer, where
diffusers' TimestepEmbedding has a place for it (`cond_proj`). Its weights start at zero, so that it changes nothing at first.
Only the network in training gets labels. For its average, which is measured, sampled and saved, all labels are zero, which is
the network without the layer. Source: Karras et al. 2022, appendix F.2.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trainers.augmentation import LABELS


@dataclass(eq=False)
class RowLabels:
    """The labels (B, 9) of the next rows, as a network in training reads them."""

    of_rows: Tensor | None = None


def _embeddings(network: Any) -> list[Any]:
    """The embedding of time of a UNet2DModel, or that of each block of a DiT, once where they share it."""
    if hasattr(network, "time_embedding"):
        return [network.time_embedding]
    return list(dict.fromkeys(block.norm1.emb.timestep_embedder for block in network.transformer_blocks))


def add_label_layer(network: nn.Module) -> None:
    """Give a network the layer, which changes nothing yet."""
    for embedding in _embeddings(network):
        embedding.cond_proj = nn.Linear(LABELS, embedding.linear_1.in_features, bias=False)
        nn.init.zeros_(embedding.cond_proj.weight)


def feed_labels(network: nn.Module) -> RowLabels:
    """Make a network with the layer read labels while it is in training mode; returns the object that takes them."""
    labels = RowLabels()

    def with_labels(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not module.training:
            return None
        assert labels.of_rows is not None, "a network in training has labels for its rows"
        return arguments[0], labels.of_rows.to(arguments[0].dtype)

    for embedding in _embeddings(network):
        embedding.register_forward_pre_hook(with_labels)
    return labels


def without_label_layer(network: nn.Module) -> nn.Module:
    """A copy of a network without the layer; itself where it has none."""
    if _embeddings(network)[0].cond_proj is None:
        return network
    network = copy.deepcopy(network)
    for embedding in _embeddings(network):
        embedding.cond_proj = None
    return network

"""diffusers' DiTTransformer2DModel as DiT and SiT have it: their initial weights, and one embedding for all blocks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from trainers.config import TrainConfig

EMBEDDING_STD = 0.02  # of the time and class embeddings' initial weights, in DiT and SiT
# DiT and SiT make queries, keys and values by one layer of D inputs and 3 D outputs, whose Xavier bound is sqrt(6 / 4 D): that
# of a layer of D outputs, sqrt(6 / 2 D), times this.
FUSED_GAIN = 0.5**0.5


def initialise(network: Any) -> None:
    """DiT's initialisation: Xavier for linear layers, zeros for each adaLN and the output, so that blocks begin as identity.

    Source: Peebles & Xie 2023, section 3.2 (adaLN-Zero).
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in network.transformer_blocks:
        for part in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            nn.init.xavier_uniform_(part.weight, gain=FUSED_GAIN)
    patches = network.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.out_channels, -1))
    nn.init.zeros_(patches.bias)
    embedding = network.transformer_blocks[0].norm1.emb
    nn.init.normal_(embedding.class_embedder.embedding_table.weight, std=EMBEDDING_STD)
    for linear in (embedding.timestep_embedder.linear_1, embedding.timestep_embedder.linear_2):
        nn.init.normal_(linear.weight, std=EMBEDDING_STD)
    for linear in (*(block.norm1.linear for block in network.transformer_blocks), network.proj_out_1, network.proj_out_2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def make_dit(config: TrainConfig, channels: int, size: tuple[int, int], num_classes: int | None) -> Any:
    """The transformer of a configuration for x (B, channels, *size), with K classes and the null class, number K."""
    from diffusers import DiTTransformer2DModel

    c = config.network
    network = DiTTransformer2DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.hidden_size // c.num_heads,
        in_channels=channels,
        num_layers=c.num_layers,
        dropout=c.dropout,
        sample_size=size[0],
        patch_size=c.patch_size,
        num_embeds_ada_norm=num_classes or 0,
    )
    share_embedding(network)
    initialise(network)
    return network


def share_embedding(network: Any, *, trained: bool = False) -> None:
    """Give all blocks one embedding of time and class, which drops no labels: the batches do, by keys.

    A `trained` network whose blocks have different embeddings, as diffusers makes them, keeps those.
    """
    embeddings = [block.norm1.emb for block in network.transformer_blocks]
    for embedding in embeddings:
        embedding.class_embedder.dropout_prob = 0.0
    if trained and not all(_are_equal(embeddings[0], other) for other in embeddings[1:]):
        return
    for block in network.transformer_blocks[1:]:
        block.norm1.emb = embeddings[0]


def _are_equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def with_own_embeddings(network: Any) -> Any:
    """A copy of a network in which no tensor is shared, as safetensors want it."""
    network = copy.deepcopy(network)
    for block in network.transformer_blocks[1:]:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)
    return network

"""diffusers' UNet2DModel from a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainers.config import TrainConfig

if TYPE_CHECKING:
    from diffusers import UNet2DModel

SMALLEST_HEAD = 8  # channels of an attention head, so that narrow blocks can attend too
HEAD = 64


def make_unet(config: TrainConfig, channels: int, size: tuple[int, int], num_classes: int | None) -> UNet2DModel:
    """The U-Net of a configuration for x (B, channels, *size), with K classes and the null class, number K, if any."""
    from diffusers import UNet2DModel

    sides = [min(size) // 2**i for i in range(len(config.network.block_channels))]
    attends = [s in config.network.attention_resolutions for s in sides]
    return UNet2DModel(
        sample_size=size[0] if size[0] == size[1] else size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=config.network.layers_per_block,
        block_out_channels=config.network.block_channels,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        norm_num_groups=min(32, min(config.network.block_channels) // 4),
        attention_head_dim=HEAD if min(config.network.block_channels) % HEAD == 0 else SMALLEST_HEAD,
        add_attention=any(attends),
        dropout=config.network.dropout,
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )

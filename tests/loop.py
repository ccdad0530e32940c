"""Somebody's own training loop, for the README's ten lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits


def my_loop(steps: int) -> dict[str, Any]:
    """`ema`, `images` and `train`: a network, its training images, and a generator of images seen, 25 000 a step."""
    from diffusers import UNet2DModel

    from mlflow_icr import EDMDenoiser

    torch.manual_seed(0)
    blocks = {"block_out_channels": (16, 32), "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, add_attention=False, **blocks
    )
    images = torch.from_numpy((load_digits().images[:48] * 255 / 16).round().astype(np.uint8))[:, None]

    def train() -> Iterator[int]:
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        denoiser = EDMDenoiser(network)
        for step in range(steps):
            x = images.float() / 127.5 - 1
            loss = (denoiser(x + 0.3 * torch.randn_like(x), 0.3) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield 25_000 * (step + 1)

    return {"ema": network, "images": images, "train": train}

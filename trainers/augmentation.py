"""What becomes of a training image before it is noised: mirror images, drawn by keys as the noise is.

Mirror images (`flip`) stand beside the images themselves, as if the data had both: samples may be mirrored too, and a view that
is mirrored tells the monitor nothing. Of latents, mirror images are encoded once, as the images are: an autoencoder does not
commute with a mirror.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FLIP = "flip"
AUGMENTATIONS = ("", FLIP)


def draw_mirrored(generator: np.random.Generator, count: int) -> Tensor:
    """Which images of a batch are mirrored left to right, (count,) bool: half of them, by chance."""
    return torch.from_numpy(generator.integers(0, 2, count).astype(bool))


def mirrored_where(chosen: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """The rows of `other` where chosen (B,) is true, else those of x; both are (B, C, H, W)."""
    return torch.where(chosen.view(-1, 1, 1, 1), other, x)

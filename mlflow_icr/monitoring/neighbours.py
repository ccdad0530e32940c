"""Pictures of the two parts of a representation: nearest images by the invariant part s and by the residual part xi."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mlflow_icr.extraction.views import as_unit_interval, make_views
from mlflow_icr.monitoring.grid import image_grid
from mlflow_icr.monitoring.protocol import Protocol

ANCHORS, NEIGHBOURS = 6, 9
WALL = 64  # images of the wall, in rows of 16


def invariant_part(features: Tensor) -> Tensor:
    """s (N, D) of features (N, K, D): the mean over views, centred over images."""
    s = features.double().mean(1)
    return s - s.mean(0)


def residual_part(features: Tensor, view: int = 0) -> Tensor:
    """xi (N, D) of one view of features (N, K, D): its difference from the image's mean, centred over images."""
    xi = features[:, view].double() - features.double().mean(1)
    return xi - xi.mean(0)


def nearest(vectors: Tensor, anchors: Tensor, count: int) -> Tensor:
    """The `count` nearest rows of `vectors` (N, D) to each anchor, by cosine, without the anchor itself, (A, count)."""
    z = normalize(vectors, dim=-1)
    similarity = z[anchors] @ z.T
    similarity[torch.arange(len(anchors)), anchors] = -torch.inf
    return similarity.topk(min(count, len(z) - 1), dim=1).indices


def anchor_images(count: int) -> Tensor:
    """A few images that are spread over the probe, the same at every step."""
    return torch.linspace(0, count - 1, min(ANCHORS, count)).round().long()


def neighbour_pictures(features: Tensor, images: Tensor, protocol: Protocol) -> dict[str, np.ndarray]:
    """Grids with an anchor at the left of each row and its nearest images after it, (H, W, 3) uint8 by key.

    `features` (N, K, D) are of `images` (N, C, H, W). `neighbours_s` shows images near in s: they should show the same
    thing. `neighbours_xi` shows first views near in xi: they should share crop, flip and brightness. Source: Li et al. 2026,
    figures 1 and 6.
    """
    features = features.cpu()
    anchors = anchor_images(len(features))
    vectors = {"neighbours_s": invariant_part(features), "neighbours_xi": residual_part(features)}
    grids = {}
    for key, z in vectors.items():
        rows = torch.cat([anchors[:, None], nearest(z, anchors, NEIGHBOURS)], 1)  # (A, 1 + count)
        places = rows.flatten().tolist()
        if key == "neighbours_s":
            pixels = as_unit_interval(images[places]) * 255
        else:
            views = make_views(
                images[places], places, num_views=1, sigma=0, seed=protocol.seed, level=protocol.augmentation_level
            )
            pixels = (views[:, 0].clamp(-1, 1) + 1) * 127.5
        grids[key] = image_grid(pixels.round().to(torch.uint8), rows.shape[1])
    return grids


def residual_wall(arrays: Mapping[str, np.ndarray], images: Tensor) -> np.ndarray:
    """The images (N, C, H, W) with the largest shares of the residual energy, the largest first, (H, W, 3) uint8."""
    order = np.argsort(-arrays["repr/residual_share"], kind="stable")[:WALL]
    pixels = (as_unit_interval(images[torch.from_numpy(order.copy())]) * 255).round().to(torch.uint8)
    return image_grid(pixels, 16)

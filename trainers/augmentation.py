"""Augmentation of training images, before noise, drawn by keys as the noise is: mirror images, or EDM's pipe.

Mirror images (`flip`) stand beside the images themselves, as if the data had both: samples may be mirrored too, and a view that
is mirrored tells the monitor nothing. With an autoencoder, mirror images are encoded once, as the images are: encoding does not
commute with mirroring.

EDM's pipe (`edm`) mirrors, scales, turns, stretches and shifts images, and tells the network so by nine numbers a row, which
are zero for an unchanged image (`augment_labels`). Samples are made with zeros, so that they do not look augmented.
Source: Karras et al. 2022, appendix F.2 and table 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

FLIP, EDM = "flip", "edm"
AUGMENTATIONS = ("", FLIP, EDM)
# Changes of error views that training makes too. EDM's pipe shifts one image in eight, each by a distance of its own, and about
# one in a thousand as an error view does: shifted views still show what is known by heart, and mirrored ones do not.
TRAINED_VIEWS: dict[str, tuple[str, ...]] = {"": (), FLIP: (FLIP,), EDM: (FLIP,)}
LABELS = 9  # x-flip, y-flip, scaling, rotation (2), anisotropy (2), translation (2)
# EDM's constants, for one standard deviation: scaling, stretching, and the shift as a share of the side.
SCALE, STRETCH, SHIFT = 2**0.2, 2**0.2, 1 / 8


def draw_mirrored(generator: np.random.Generator, count: int) -> Tensor:
    """A mask (count,) bool of a batch's images that are mirrored left to right: half of them, by chance."""
    return torch.from_numpy(generator.integers(0, 2, count).astype(bool))


def mirrored_where(chosen: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """The rows of `other` where chosen (B,) is true, else those of x; both are (B, C, H, W)."""
    return torch.where(chosen.view(-1, 1, 1, 1), other, x)


@dataclass(frozen=True, eq=False)
class Warps:
    """EDM's transformations of B images, each (B,) float64: 0 where one is left out, and its labels are 0 there too.

    `flip_x` and `flip_y` are 0 or 1; `scale`, `stretch`, `right` and `down` are standard normal; `turn` is the angle of the
    rotation and `axis` that of the stretched axis, in radians.
    """

    flip_x: np.ndarray
    flip_y: np.ndarray
    scale: np.ndarray
    turn: np.ndarray
    stretch: np.ndarray
    axis: np.ndarray
    right: np.ndarray
    down: np.ndarray

    def labels(self) -> Tensor:
        """The augmentation labels for the network, (B, 9) float32; zeros for an unchanged image."""
        turned = np.cos(self.turn) - 1, np.sin(self.turn)
        stretched = self.stretch * np.cos(self.axis), self.stretch * np.sin(self.axis)
        columns = (self.flip_x, self.flip_y, self.scale, *turned, *stretched, self.right, self.down)
        return torch.from_numpy(np.stack(columns, 1)).float()

    def matrices(self, size: tuple[int, int]) -> np.ndarray:
        """Affine maps of pixels, (B, 2, 3), from (x, y, 1) counted from the centre, right and down; without the mirrors."""
        height, width = size
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        rotated = _matrices(cos, -sin, sin, cos) * (SCALE**self.scale)[:, None, None]
        cos, sin, longer = np.cos(self.axis), np.sin(self.axis), STRETCH**self.stretch
        turned = _matrices(cos, -sin, sin, cos)
        along = turned * np.stack([longer, 1 / longer], 1)[:, None, :]  # turned @ diag(longer, 1 / longer)
        linear = along @ turned.transpose(0, 2, 1) @ rotated
        offset = SHIFT * np.stack([self.right * width, self.down * height], 1)
        return np.concatenate([linear, offset[:, :, None]], 2)


class Augmented(NamedTuple):
    """A batch's augmentation: labels (B, 9), and which images are mirrored (B, 2) bool, left to right and top to bottom.

    `places` (B, 2, 3) float32 says where `affine_grid` reads each pixel, and `warped` (B,) whether an image is moved at all.
    """

    labels: Tensor
    mirrored: Tensor
    places: Tensor
    warped: Tensor


def _matrices(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.stack([np.stack([a, b], 1), np.stack([c, d], 1)], 1)


def draw_warps(generator: np.random.Generator, count: int, probability: float) -> Warps:
    """Transformations of `count` images: half are mirrored left to right; all others have this probability, each."""
    applied = generator.random((5, count)) < probability
    flips = generator.integers(0, 2, (2, count))
    angles = generator.uniform(-np.pi, np.pi, (2, count))
    scale, stretch, right, down = generator.standard_normal((4, count))
    flip_y, scaled, turned, stretched, shifted = applied
    return Warps(
        flip_x=flips[0].astype(float),
        flip_y=flips[1] * flip_y,
        scale=scale * scaled,
        turn=angles[0] * turned,
        stretch=stretch * stretched,
        axis=angles[1] * stretched,
        right=right * shifted,
        down=down * shifted,
    )


def reading_places(warps: Warps, size: tuple[int, int]) -> Tensor:
    """Where each pixel of B moved images is read, (B, 2, 3) float32, as `affine_grid` takes it."""
    forward = warps.matrices(size)
    half = np.array(size[::-1]) / 2  # of width and height, in which affine_grid counts from the centre
    inverse = np.linalg.inv(forward[:, :, :2])
    offset = -inverse @ forward[:, :, 2:]
    return torch.from_numpy(np.concatenate([inverse * half, offset], 2) / half[:, None]).float()


def draw_augmented(generator: np.random.Generator, count: int, probability: float, size: tuple[int, int]) -> Augmented:
    """The augmentation of a batch of `count` images of a size (height, width)."""
    warps = draw_warps(generator, count, probability)
    warped = np.stack([warps.scale, warps.turn, warps.stretch, warps.right, warps.down]).any(0)
    mirrored = torch.from_numpy(np.stack([warps.flip_x, warps.flip_y], 1) > 0)
    return Augmented(warps.labels(), mirrored, reading_places(warps, size), torch.from_numpy(warped))


def augment(x: Tensor, how: Augmented) -> Tensor:
    """Images x (B, C, H, W) mirrored and moved, reflected at their borders; of x's dtype.

    An image that is not moved stays the same to the bit. Others are interpolated bicubically, since bilinear interpolation
    blurs them; on MPS, which has no other, bilinearly.
    """
    x = mirrored_where(how.mirrored[:, 0], x, x.flip(-1))
    x = mirrored_where(how.mirrored[:, 1], x, x.flip(-2))
    grid = affine_grid(how.places, list(x.shape), align_corners=False)
    mode = "bilinear" if x.device.type == "mps" else "bicubic"
    moved = grid_sample(x, grid, mode=mode, padding_mode="reflection", align_corners=False)
    return mirrored_where(how.warped, x, moved)

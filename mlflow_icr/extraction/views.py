"""Views of training images: augment in [0, 1], scale to [-1, 1], add Gaussian noise.

Every draw of view k of image i comes from a stream keyed by (seed, i, k), and a stream always yields its numbers in the
same order and number. So a view does not depend on the batch, the rank or the device that makes it; the crop of level 1 is
also the crop of level 5; and the noise at two sigmas is the same noise, scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from mlflow_icr.extraction.keyed import keyed_generator

# Levels of Li et al. 2026, figure 13: each adds one transformation to the one before it.
AUGMENTATION_LEVELS = {
    1: "random crop",
    2: "+ horizontal flip",
    3: "+ colour jitter",
    4: "+ rotation",
    5: "+ centre crop",
}

# The paper names the transformations without their strengths. These are mild ones: what an image shows must stay
# visible at 8x8 pixels too, for "invariant" to mean the content and not just the mean grey value.
CROP_AREA = (0.6, 1.0)  # share of the image's area that a random crop keeps
CROP_LOG_RATIO = math.log(4 / 3)  # |log aspect ratio| of a crop, the usual 3:4 to 4:3
BRIGHTNESS = CONTRAST = SATURATION = 0.4  # factors in [1 - 0.4, 1 + 0.4]
HUE = 0.1  # as a share of a full turn, either way
ROTATION_DEGREES = 15.0
CENTRE_CROP = 0.875  # side of the centre crop over the image's side: 224 of 256 pixels, the usual test-time crop

AUGMENTATION_CONSTANTS = {
    "crop_area": CROP_AREA,
    "crop_log_ratio": CROP_LOG_RATIO,
    "jitter": (BRIGHTNESS, CONTRAST, SATURATION, HUE),
    "rotation_degrees": ROTATION_DEGREES,
    "centre_crop": CENTRE_CROP,
}

NUM_PARAMETERS = 10  # uniform draws per view; fixed, so that levels share their crops


class _Draws:
    """The draws for B views: parameters uniform in [0, 1), (B, 10) float64, and after them unit noise."""

    def __init__(self, indices: Sequence[int], views: Sequence[int], seed: int) -> None:
        self._streams = [keyed_generator("view", seed, i, k) for i, k in zip(indices, views, strict=True)]
        self.uniform = torch.from_numpy(np.stack([stream.random(NUM_PARAMETERS) for stream in self._streams]))

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Unit noise (B, *shape) float32, to be drawn once."""
        return torch.from_numpy(np.stack([s.standard_normal(shape, dtype=np.float32) for s in self._streams]))


CHECKED = 2**22  # values that are checked at a time


def check_images(images: Tensor) -> None:
    """Raise ValueError unless images are (N, C, H, W), uint8, uint16 or floats in [0, 1]; makes no copy of them."""
    if images.ndim != 4 or images.shape[1] < 1:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (N, C, H, W) with C >= 1")
    if images.dtype in (torch.uint8, torch.uint16):
        return
    if not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}; expected uint8 in [0, 255], uint16 or floats in [0, 1]")
    if images.numel():
        limits = [part.aminmax() for part in images.split(max(1, CHECKED // images[0].numel()))]
        low, high = float(torch.stack([x.min for x in limits]).min()), float(torch.stack([x.max for x in limits]).max())
        if not (low >= 0 and high <= 1):  # also true for NaN
            raise ValueError(f"images range from {low:g} to {high:g}; expected floats in [0, 1] or uint8 in [0, 255]")


def as_unit_interval(images: Tensor) -> Tensor:
    """Images (N, C, H, W) as float32 in [0, 1], from uint8, from uint16, or from floats that already are.

    Raises ValueError for other shapes, dtypes or ranges.
    """
    check_images(images)
    if images.dtype in (torch.uint8, torch.uint16):
        return images.to(torch.float32) / (255 if images.dtype == torch.uint8 else 65535)
    return images.float()


def _sampling_matrices(uniform: Tensor, level: int, height: int, width: int) -> Tensor:
    """Crop, flip, rotation and centre crop as one map from output to input coordinates in [-1, 1], (B, 2, 3)."""
    area = CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * uniform[:, 0]
    stretch = ((2 * uniform[:, 1] - 1) * CROP_LOG_RATIO / 2).exp()  # square root of the aspect ratio
    half_width = (area.sqrt() * stretch).clamp(max=1)
    half_height = (area.sqrt() / stretch).clamp(max=1)
    shift_x = (2 * uniform[:, 2] - 1) * (1 - half_width)
    shift_y = (2 * uniform[:, 3] - 1) * (1 - half_height)
    mirror = torch.where(uniform[:, 4] < 0.5, -1.0, 1.0) if level >= 2 else torch.ones_like(area)
    angle = (2 * uniform[:, 9] - 1) * math.radians(ROTATION_DEGREES) if level >= 4 else torch.zeros_like(area)
    zoom = CENTRE_CROP if level >= 5 else 1.0
    # Rotate in pixels, not in normalised units, so that a wide image is turned and not sheared.
    aspect = width / height
    cos, sin = angle.cos(), angle.sin()
    return torch.stack(
        [
            torch.stack([zoom * half_width * mirror * cos, -zoom * half_width * mirror * sin / aspect, shift_x], 1),
            torch.stack([zoom * half_height * sin * aspect, zoom * half_height * cos, shift_y], 1),
        ],
        1,
    )


def _resample(images: Tensor, matrices: Tensor) -> Tensor:
    """Bilinear resampling of images (B, C, H, W) through matrices (B, 2, 3), reflecting at the border."""
    height, width = images.shape[-2:]
    y = (torch.arange(height, dtype=torch.float64) * 2 + 1) / height - 1
    x = (torch.arange(width, dtype=torch.float64) * 2 + 1) / width - 1
    m = matrices[:, :, :, None, None]  # (B, 2, 3, 1, 1)
    grid = m[:, :, 0] * x + m[:, :, 1] * y[:, None] + m[:, :, 2]  # (B, 2, H, W)
    grid = grid.movedim(1, -1).float().to(images.device)
    return grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _jitter(images: Tensor, uniform: Tensor) -> Tensor:
    """Colour jitter of images (B, C, H, W) in [0, 1]: brightness, contrast, and for three channels saturation, hue."""
    from kornia import enhance  # half a second of import time that only augmentation needs

    factor = (2 * uniform[:, 5:9] - 1).float().to(images)  # (B, 4) in [-1, 1)
    images = enhance.adjust_brightness_accumulative(images, 1 + BRIGHTNESS * factor[:, 0])
    if images.shape[1] == 3:
        images = enhance.adjust_contrast_with_mean_subtraction(images, 1 + CONTRAST * factor[:, 1])
        images = enhance.adjust_saturation_with_gray_subtraction(images, 1 + SATURATION * factor[:, 2])
        return enhance.adjust_hue(images, 2 * math.pi * HUE * factor[:, 3])
    # Outside RGB there is no luminance: contrast is taken around each image's own mean over all channels.
    mean = images.mean((1, 2, 3), keepdim=True)
    return (mean + (1 + CONTRAST * factor[:, 1, None, None, None]) * (images - mean)).clamp(0, 1)


def make_views(
    images: Tensor,
    indices: Sequence[int],
    *,
    num_views: int,
    sigma: float,
    seed: int,
    level: int = 3,
    device: torch.device | str = "cpu",
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Noised, augmented views of some images: (B, K, C, H, W) float32 in [-1, 1] plus noise of standard deviation sigma.

    With `encode`, a latent model's map from images (B, C, H, W) in [-1, 1] to latents (B, C', H', W'), views are augmented as
    pixels, encoded, and noised as latents: the result is (B, K, C', H', W').

    `images` are the B images themselves, (B, C, H, W), uint8 or floats in [0, 1]; `indices` are their B fixed numbers in
    the data set, which key the draws. Draws are made on the CPU; augmentation runs on `device`, where floating point may
    round differently. `level` is one of AUGMENTATION_LEVELS. Raises ValueError for values outside their range.
    Source: Li et al. 2026, section "Protocol".
    """
    if level not in AUGMENTATION_LEVELS:
        raise ValueError(f"level is {level!r}; expected one of {', '.join(map(str, AUGMENTATION_LEVELS))}")
    if not (sigma >= 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma is {sigma}; expected a finite number >= 0")
    if num_views < 1:
        raise ValueError(f"num_views is {num_views}; expected at least 1")
    if len(indices) != len(images):
        raise ValueError(f"{len(indices)} indices for {len(images)} images; expected one for each")
    clean = as_unit_interval(images).to(device)
    batch, shape = clean.shape[0], tuple(clean.shape[1:])
    if batch == 0:
        return clean.new_empty(0, num_views, *shape)
    draws = _Draws([int(i) for i in indices for _ in range(num_views)], list(range(num_views)) * batch, seed)
    views = _resample(clean.repeat_interleave(num_views, 0), _sampling_matrices(draws.uniform, level, shape[1], shape[2]))
    if level >= 3:
        views = _jitter(views, draws.uniform)
    views = views * 2 - 1
    if encode is not None:
        views = encode(views)
    shape = tuple(views.shape[1:])
    return (views + sigma * draws.noise(shape).to(views.device)).view(batch, num_views, *shape)

"""Views for the error ratio: moved and mirrored images that are as sharp as the images themselves.

A view must be neither easier nor harder to denoise for a network that has memorized no image. Bilinear crops are blurred, and
so easier; here a shift keeps the spectrum. Aligned images (digits, centred clothes) are harder to denoise once they are moved
or mirrored, whatever the network has memorized: this bias grows with the square of the shift. So *near* views move by 1/128 of
the side, where the bias is below 0.05 on every set and denoiser that was tried (`python -m studies.views`). *Far* views, moved
by 1/16 of the side and mirrored, are for images that are not aligned, such as photographs.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAR, FAR = 1 / 128, 1 / 16  # shares of the side
ERROR_VIEWS = {"near": NEAR, "far": FAR}
# Augmentations that training may use; the network must not be measured on views that it was trained on.
AUGMENTATIONS = ("flip", "shift")
DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0))


def shift_images(images: Tensor, down: float, right: float) -> Tensor:
    """Images (..., H, W) shifted by pixels, whole or fractional, and reflected at their borders; the spectrum is kept.

    A shift by whole pixels is exact. Others turn the phases of the reflected image's Fourier series (which has half-sample
    symmetry, as that of the discrete cosine transform), so that nothing is smoothed; values may leave their range a little.
    """
    for dim, pixels in ((-2, down), (-1, right)):
        if pixels:
            images = _shift_along(images, float(pixels), dim)
    return images


def _shift_along(images: Tensor, pixels: float, dim: int) -> Tensor:
    n = images.shape[dim]
    reflected = torch.cat([images, images.flip(dim)], dim)
    if pixels == round(pixels):
        return reflected.roll(round(pixels), dim).narrow(dim, 0, n)
    # float64 on the CPU: views are made once, and must be the same for every device.
    spectrum = torch.fft.rfft(reflected.double().cpu(), dim=dim)
    turn = torch.exp(-1j * torch.pi * pixels / n * torch.arange(n + 1, dtype=torch.float64))
    turned = spectrum * turn.view(-1, *[1] * (-1 - dim))
    return torch.fft.irfft(turned, n=2 * n, dim=dim).narrow(dim, 0, n).to(images.device, images.dtype)


def near_views(images: Tensor, axes: Tensor) -> Tensor:
    """Two views of each image (B, C, H, W), shifted in opposite directions by 1/128 of the side, (B, 2, C, H, W).

    `axes` (B,) says whether an image moves down and up (0) or right and left (1). Effects that are linear in the shift cancel
    in the mean of the two.
    """
    height, width = images.shape[-2:]
    by_axis = torch.stack(
        [
            torch.stack([shift_images(images, sign * NEAR * height, 0) for sign in (1, -1)], 1),
            torch.stack([shift_images(images, 0, sign * NEAR * width) for sign in (1, -1)], 1),
        ]
    )  # (2, B, 2, C, H, W)
    return by_axis[axes.to(images.device), torch.arange(len(images), device=images.device)]


def far_views(images: Tensor, directions: Tensor, trained: tuple[str, ...] = ()) -> Tensor:
    """One view of each image (B, C, H, W), (B, C, H, W): shifted by 1/16 of the side, and half of them mirrored.

    `directions` (B,) are integers: the remainder by 4 chooses the direction, and an odd quotient mirrors. Those of
    AUGMENTATIONS in `trained` are left out. Raises ValueError where none remains.
    """
    if set(trained) >= set(AUGMENTATIONS):
        raise ValueError("training flips and shifts its images itself; no view remains that it was not trained on")
    height, width = images.shape[-2:]
    directions = directions.to(images.device)
    view = images
    if "shift" not in trained:
        down, right = (max(1, round(FAR * side)) for side in (height, width))
        moved = torch.stack([shift_images(images, a * down, b * right) for a, b in DIRECTIONS])
        view = moved[directions % len(DIRECTIONS), torch.arange(len(images), device=images.device)]
    if "flip" in trained:
        return view
    mirror = (directions // len(DIRECTIONS) % 2 == 1) | ("shift" in trained)
    return torch.where(mirror.view(-1, 1, 1, 1), view.flip(-1), view)

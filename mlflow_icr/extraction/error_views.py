"""Views for the error ratio: moved and mirrored images that are as sharp as the images themselves.

A view must be neither easier nor harder to denoise for a network that knows no image by heart. Bilinear crops are blurred,
and so easier; here a shift keeps the spectrum. Images that are aligned (digits, centred clothes) are harder to denoise once
they are moved or mirrored, whatever the network knows: the bias grows with the square of the way. So *near* views move by 1/128
of the side, where it is below 0.05 on every set and denoiser that was tried (`python -m studies.views`), and *far* ones, moved
by 1/16 of the side and mirrored, are for images without a place of their own, such as photographs.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAR, FAR = 1 / 128, 1 / 16  # shares of the side
ERROR_VIEWS = {"near": NEAR, "far": FAR}
# What training may itself do to its images; a network is not to be asked about views that it was trained on.
AUGMENTATIONS = ("flip", "shift")
DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0))


def shift_images(images: Tensor, down: float, right: float) -> Tensor:
    """Images (..., H, W) moved by so many pixels, whole or not, reflected at their borders; the spectrum stays what it is.

    A shift by whole pixels is exact. Others turn the phases of the reflected image's Fourier series (which has half-sample
    symmetry, as that of the discrete cosine transform), so that nothing is smoothed; values may leave their range a little.
    """
    for dim, way in ((-2, down), (-1, right)):
        if way:
            images = _shift_along(images, float(way), dim)
    return images


def _shift_along(images: Tensor, way: float, dim: int) -> Tensor:
    n = images.shape[dim]
    reflected = torch.cat([images, images.flip(dim)], dim)
    if way == round(way):
        return reflected.roll(round(way), dim).narrow(dim, 0, n)
    # float64 on the CPU: views are made once, and must be the same for every device.
    spectrum = torch.fft.rfft(reflected.double().cpu(), dim=dim)
    turn = torch.exp(-1j * torch.pi * way / n * torch.arange(n + 1, dtype=torch.float64))
    turned = spectrum * turn.view(-1, *[1] * (-1 - dim))
    return torch.fft.irfft(turned, n=2 * n, dim=dim).narrow(dim, 0, n).to(images.device, images.dtype)


def near_views(images: Tensor, axes: Tensor) -> Tensor:
    """Two views of each image (B, C, H, W), moved there and back by 1/128 of the side, (B, 2, C, H, W).

    `axes` (B,) says of each image whether it moves down and up (0) or right and left (1): on average over both ways what
    changes in proportion to the way cancels.
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
    """A view of each image (B, C, H, W), (B, C, H, W): moved by 1/16 of the side, and every other one mirrored too.

    `directions` (B,) integers choose among four ways, and by their second half whether to mirror. What is `trained`, of
    AUGMENTATIONS, is left out. Raises ValueError where nothing is left.
    """
    if set(trained) >= set(AUGMENTATIONS):
        raise ValueError("training flips and shifts its images itself; nothing is left that it does not know")
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

"""Error views: as sharp as the images, and no easier or harder for a denoiser that cannot know the images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mlflow_icr.extraction.error_views import far_views, near_views, shift_images


def test_whole_shifts_are_exact_and_others_lie_between() -> None:
    images = torch.rand(3, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    moved = shift_images(images, 2, -3)
    assert torch.equal(moved[..., 2:, :5], images[..., :-2, 3:])
    assert torch.equal(moved[..., 0, :5], images[..., 1, 3:])  # reflected at the border, the border's pixels twice
    torch.testing.assert_close(shift_images(images, 1 + 1e-9, 0), shift_images(images, 1, 0), atol=1e-6, rtol=0)
    # A cosine that fits the reflected image is moved exactly, by any way.
    x = torch.arange(8, dtype=torch.float64) + 0.5
    wave = torch.cos(math.pi * 3 * x / 8).expand(1, 1, 6, 8)
    expected = torch.cos(math.pi * 3 * (x - 0.37) / 8).expand(1, 1, 6, 8)
    torch.testing.assert_close(shift_images(wave, 0, 0.37), expected, atol=1e-12, rtol=0)


def test_views_do_what_they_are_asked(rng: np.random.Generator) -> None:
    images = torch.from_numpy(rng.random((8, 1, 8, 8), dtype=np.float32))
    near = near_views(images, torch.arange(8) % 2)
    assert torch.equal(near[1, 0], shift_images(images[1], 0, 8 / 128))
    assert torch.equal(near[2, 1], shift_images(images[2], -8 / 128, 0))
    far = far_views(images, torch.arange(8))
    assert torch.equal(far[3], shift_images(images[3], -1, 0))
    assert torch.equal(far[4], shift_images(images[4], 0, 1).flip(-1))
    assert torch.equal(far_views(images, torch.arange(8), ("flip",))[4], shift_images(images[4], 0, 1))
    assert torch.equal(far_views(images, torch.arange(8), ("shift",)), images.flip(-1))
    with pytest.raises(ValueError, match="no view remains"):
        far_views(images, torch.arange(8), ("flip", "shift"))

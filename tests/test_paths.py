"""The optimal denoiser of a training set, and the distance from it along the sampler's path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import nn

from mlflow_icr import EDMDenoiser, GenerationMonitor
from mlflow_icr.generation import empirical, optimal_denoiser
from mlflow_icr.monitoring.paths import PathReader, sampled_path


class Optimal:
    """D* of some images, as a denoiser; `blur` of it is the mean of the images instead."""

    network = nn.Identity()

    def __init__(self, images: torch.Tensor, blur: float = 0.0) -> None:
        self.known, self.blur = images.float() / 127.5 - 1, blur

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        best = optimal_denoiser(x.flatten(1), float(sigma), self.known.flatten(1)).float().view_as(x)
        return (1 - self.blur) * best + self.blur * self.known.mean(0)


def test_the_optimal_denoiser_is_its_formula(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rng.standard_normal((7, 5)), rng.standard_normal((40, 5))
    for rows in (empirical.ROWS, 15):  # whole, and three images at a time
        monkeypatch.setattr(empirical, "ROWS", rows)
        for sigma in (0.02, 0.5, 50.0):
            squared = ((x[:, None] - y) ** 2).sum(2)
            expected = softmax(-squared / (2 * sigma**2), 1) @ y
            found = optimal_denoiser(torch.from_numpy(x), sigma, torch.from_numpy(y))
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
            # What x came from is not known: the same without that row.
            known = torch.arange(7) * 5
            left = optimal_denoiser(torch.from_numpy(x), sigma, torch.from_numpy(y), leave_out=known)
            for i in range(7):
                others = np.delete(np.arange(40), 5 * i)
                np.testing.assert_allclose(left[i], softmax(-squared[i, others] / (2 * sigma**2)) @ y[others], rtol=1e-9)
    bytes_ = torch.randint(256, (9, 5), dtype=torch.uint8)
    torch.testing.assert_close(
        optimal_denoiser(torch.zeros(2, 5), 1.0, bytes_), optimal_denoiser(torch.zeros(2, 5), 1.0, bytes_.double() / 127.5 - 1)
    )
    with pytest.raises(ValueError, match="sigma is 0; expected a positive number"):
        optimal_denoiser(torch.zeros(2, 5), 0, bytes_)
    with pytest.raises(ValueError, match="expected at least 2"):
        optimal_denoiser(torch.zeros(1, 5), 1.0, bytes_[:1], leave_out=torch.zeros(1, dtype=torch.long))


def test_a_network_that_copies_stays_at_the_optimum(small_unet: nn.Module, digits: torch.Tensor) -> None:
    train, heldout = digits[:40], digits[40:]
    for fresh in (heldout, None):
        reader = PathReader(train, fresh, seed=0, num_steps=18)
        sigmas, copying = reader.read(Optimal(train, 0.01))
        assert len(sigmas) == 8
        assert copying.shape == (8, 64)
        assert copying.max() < 0.05
        _, others = reader.read(Optimal(heldout))  # draws images, and none of training
        assert 0.6 < others[-3:].median() < 1.4
    _, path = sampled_path(Optimal(train), torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 18)
    assert all(0.1 <= sigma <= 10 for sigma in path.sigmas)
    assert path.x.shape == path.denoised.shape == (8, 4, 1, 8, 8)


def test_generation_reports_paths_and_quantiles(small_unet: nn.Module, digits: torch.Tensor) -> None:
    copier = GenerationMonitor(Optimal(digits[:40]), digits[:40], digits[40:], num_samples=24, num_steps=8).measure(1).values
    other = GenerationMonitor(EDMDenoiser(small_unet), digits[:40], digits[40:], num_samples=24, num_steps=8).measure(1).values
    assert copier["mem/path_distance"] < 1e-3 < other["mem/path_distance_q10"] <= other["mem/path_distance"]
    assert copier["mem/ratio_l2_q50"] < 1 / 3 < other["mem/ratio_l2_q05"] <= other["mem/ratio_l2_q25"]
    assert sum(key.startswith("mem/path_distance_sigma") for key in other) == 3  # of 8 steps so many lie from 10 to 0.1


class Counting(EDMDenoiser):
    """A denoiser that counts the images it was asked about."""

    asked = 0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor | float, **others: torch.Tensor) -> torch.Tensor:
        self.asked += len(x)
        return super().__call__(x, sigma, **others)


def test_the_first_samples_are_the_trajectories(small_unet: nn.Module, digits: torch.Tensor) -> None:
    denoiser = Counting(small_unet)
    options = {"num_samples": 80, "num_steps": 8, "batch_size": 48, "pictures": False}
    monitor = GenerationMonitor(denoiser, digits[:40], digits[40:], **options)  # type: ignore[arg-type]
    denoiser.asked = 0
    report = monitor.measure(1)
    assert denoiser.asked == 80 * 15  # and none for the look along the path
    assert report.figures == {}
    sigmas, distances = monitor.paths.read(denoiser)
    for sigma, row in zip(sigmas, distances, strict=True):
        np.testing.assert_allclose(report.values[f"mem/path_distance_sigma{sigma:.2g}"], row.median(), rtol=1e-4)

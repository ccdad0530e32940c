"""Sharded equals whole: moments and monitors on several processes (gloo)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from mlflow_icr import EDMDenoiser, GenerationMonitor, ICRMonitor, Protocol, ViewMoments, icr
from tests.features import covariance, gaussian_features
from tests.training import errors_of
from trainers.data import load_data

RANKS = 3
PROTOCOL = Protocol(num_images=47, num_views=4)  # not a multiple of the ranks


def _moments(rank: int, folder: str) -> dict[str, object]:
    h = torch.load(f"{folder}/features.pt", weights_only=True)
    moments = ViewMoments(2, h.shape[-1])
    # Uneven shares, and a rank with nothing.
    shares = [slice(0, 70), slice(70, 70), slice(70, None)]
    moments.update(h[shares[rank]]).all_reduce()
    spectrum = moments.spectrum()
    return {
        "n": moments.num_images,
        "icr": spectrum.icr,
        "sigma_xi": spectrum.sigma_residual,
        "sigma_s": spectrum.sigma_invariant,
    }


def _monitors(rank: int, folder: str) -> dict[str, object]:
    network, images = torch.load(f"{folder}/model.pt", weights_only=False)  # written by this test
    denoiser = EDMDenoiser(network)
    with errors_of():
        report = ICRMonitor(denoiser, images, PROTOCOL, companions=("rankme", "lidar"), pictures=True).measure(5)
    samples = GenerationMonitor(denoiser, images[:40], images[40:], num_samples=71, num_steps=4)
    # One image that only one rank sees makes features that are not finite: all ranks must say so, and none may hang.
    monitor = ICRMonitor(denoiser, images, PROTOCOL)
    if rank == 1:
        views = list(monitor.reader.views(0.29, torch.device("cpu")))
        views[0][0] = float("nan")
        monitor.reader._cache[0.29] = views
    assert "NaN or Inf in 1 of 47 images" in monitor.measure(6).absent["repr/icr"]
    values = {**report.values, **samples.measure(5).values}
    pictures = {key: torch.from_numpy(picture) for key, picture in report.figures.items()}
    influence = torch.from_numpy(report.arrays["repr/influence"])
    return {"values": values, "samples": samples.sample(), "pictures": pictures, "influence": influence}


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    torch.save({"moments": _moments(rank, folder), "monitors": _monitors(rank, folder)}, f"{folder}/result{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    rng = np.random.default_rng(5)
    return torch.from_numpy(gaussian_features(rng, 200, 2, covariance(rng, 9), covariance(rng, 9), mean=1e3))


@pytest.fixture(scope="module")
def set_of_digits() -> torch.Tensor:
    return load_data("digits", resolution=8, num_images=64, num_heldout=0, seed=0).train


@pytest.fixture(scope="module")
def results(
    features: torch.Tensor, set_of_digits: torch.Tensor, small_unet: nn.Module, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of three processes has come to, which import everything but once."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(features, folder / "features.pt")
    torch.save((small_unet, set_of_digits), folder / "model.pt")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(_work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_moments_of_all_ranks_are_those_of_all_images(features: torch.Tensor, results: list[dict[str, Any]]) -> None:
    whole, moments = icr(features), [result["moments"] for result in results]
    for result in moments:
        assert result["n"] == 200
        # float64 with a mean of 1000 standard deviations: 1e-16 x 1e3, and sums of 200 terms
        assert result["icr"] == pytest.approx(whole.icr, rel=1e-11)
        torch.testing.assert_close(result["sigma_xi"], whole.sigma_residual, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(result["sigma_s"], whole.sigma_invariant, rtol=1e-10, atol=1e-12)
        assert result["icr"] == moments[0]["icr"]


def test_monitors_of_all_ranks_report_what_one_reports(
    set_of_digits: torch.Tensor, small_unet: nn.Module, results: list[dict[str, Any]]
) -> None:
    denoiser, digits, found = EDMDenoiser(small_unet), set_of_digits, [result["monitors"] for result in results]
    with errors_of():
        report = ICRMonitor(denoiser, digits, PROTOCOL, companions=("rankme", "lidar"), pictures=True).measure(5)
    alone, influence = report.values, torch.from_numpy(report.arrays["repr/influence"])
    samples = GenerationMonitor(denoiser, digits[:40], digits[40:], num_samples=71, num_steps=4).sample()
    for result in found:
        values = result["values"]
        assert {k: v for k, v in values.items() if not k.startswith("perf/")} == {
            k: v for k, v in found[0]["values"].items() if not k.startswith("perf/")
        }
        for key, value in alone.items():
            if key.startswith("repr/"):
                assert values[key] == pytest.approx(value, rel=1e-3), key  # float32 convolutions in other batches
        assert result["pictures"].keys() == report.figures.keys()
        for key, picture in found[0]["pictures"].items():
            assert torch.equal(result["pictures"][key], picture)
        spread = float(influence.abs().max())
        torch.testing.assert_close(result["influence"], influence, rtol=0, atol=2e-2 * spread)
        # In order, whole, and none twice: at most a rounding of one grey value apart.
        assert (result["samples"].int() - samples.int()).abs().max() <= 1

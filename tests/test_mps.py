"""Measuring on a device without float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mlflow_icr import EDMDenoiser, GenerationMonitor, ICRMonitor, Protocol
from mlflow_icr.monitoring import errors
from tests.fake_mps import MPS, FakeMPS, MPSTensor, on_mps


def test_the_fake_device_refuses_what_mps_refuses() -> None:
    with FakeMPS():
        x = torch.ones(3).to(MPS)
        assert (x.device.type, (x + 1).sum().item()) == ("mps", 6)
        assert torch.zeros(2, device=MPS).device.type == "mps"
        assert x.cpu().device.type == "cpu"
        for wrong in (
            lambda: x.double(),
            lambda: torch.zeros(2, dtype=torch.float64, device=MPS),
            lambda: torch.ones(2).double().to(MPS),
        ):
            with pytest.raises(TypeError, match="float64"):
                wrong()
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)


def test_monitors_make_no_float64_on_mps(small_unet: nn.Module, digits: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "ERROR_IMAGES", 16)  # enough for every operation
    monkeypatch.setattr(errors, "LEVEL_IMAGES", 16)
    protocol = Protocol(num_images=16, num_views=2)

    def reports(network: nn.Module) -> dict[str, float]:
        denoiser = EDMDenoiser(network)
        monitor = ICRMonitor(denoiser, digits[:40], protocol, companions=("rankme", "stable_rank", "sima"), heldout=digits[40:])
        samples = GenerationMonitor(denoiser, digits[:40], digits[40:], num_samples=64, num_steps=6, pictures=False)
        return monitor.measure(1).values | samples.measure(1).values

    expected = reports(small_unet)
    with FakeMPS():
        network = on_mps(copy.deepcopy(small_unet))
        assert isinstance(next(network.parameters()), MPSTensor)
        found = reports(network)
    assert found.keys() == expected.keys()
    same = {key for key in expected if not key.startswith("perf/")}
    for key in same:
        assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key

"""Batches that fit the memory: halved where it runs out, kept where they work, with the numbers that they had."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mlflow_icr import EDMDenoiser, GenerationMonitor, ICRMonitor, LossMonitor, Protocol
from mlflow_icr.extraction import fitting
from mlflow_icr.extraction.denoisers import Denoiser
from mlflow_icr.extraction.fitting import FittingBatches, activation_bytes, host_batch


def limited(most: int, seen: list[int]) -> Callable[[slice], int]:
    def work(rows: slice) -> int:
        seen.append(rows.stop - rows.start)
        if seen[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 174.00 GiB")
        return seen[-1]

    return work


def test_a_batch_is_halved_until_it_fits_and_stays_so() -> None:
    batches, seen = FittingBatches(32), list[int]()
    assert list(batches.over(50, limited(10, seen))) == [8, 8, 8, 8, 8, 8, 2]
    assert seen[:3] == [32, 16, 8]
    seen.clear()
    assert sum(batches.over(9, limited(10, seen))) == 9
    assert seen == [8, 1]  # nothing is tried again that has failed
    assert list(batches.over(3, limited(10, seen), each=4)) == [2, 1]  # eight views are two images


@pytest.mark.parametrize(
    "error", [ValueError("features hold NaN"), RuntimeError("shapes do not match"), RuntimeError("CUDA out of memory")]
)
def test_other_errors_and_a_row_that_does_not_fit_are_not_hidden(error: Exception) -> None:
    def work(rows: slice) -> None:
        raise error

    batches = FittingBatches(4)
    with pytest.raises(type(error), match=str(error)):
        list(batches.over(4, work))
    assert batches.size == (1 if "memory" in str(error) else 4)


class Narrow:
    """A denoiser that has memory for so many images at a time."""

    def __init__(self, inner: EDMDenoiser, most: int) -> None:
        self.inner, self.most, self.refused = inner, most, 0

    @property
    def network(self) -> nn.Module:
        return self.inner.network

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        if len(x) > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError("out of memory")
        return self.inner(x, sigma)


def _loss(denoiser: Denoiser, x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    return (denoiser(x + sigma.view(-1, 1, 1, 1) * noise, sigma) - x).square().mean()


def test_monitors_measure_the_same_in_the_memory_there_is(small_unet: nn.Module, digits: Tensor) -> None:
    whole = EDMDenoiser(small_unet)
    found = []
    for denoiser in (whole, Narrow(whole, 11)):
        values = ICRMonitor(denoiser, digits[:40], Protocol(num_images=40, num_views=4)).measure(1).values
        loss = LossMonitor(
            denoiser, partial(_loss, denoiser), lambda g, n: torch.from_numpy(g.random(n)).float(), digits[:40], digits[40:]
        )
        values |= loss.measure(1).values
        samples = GenerationMonitor(denoiser, digits[:40], digits[40:], num_samples=24, num_steps=3).sample()
        found.append(({k: v for k, v in values.items() if not k.startswith("perf/")}, samples))
        if isinstance(denoiser, Narrow):
            assert 0 < denoiser.refused <= 20  # a few halvings in all, not one a batch
    excesses, others = [], []
    for values, _ in found:
        excesses.append({key: value for key, value in values.items() if "_excess" in key})
        others.append({key: value for key, value in values.items() if "_excess" not in key})
    assert others[1] == pytest.approx(others[0], rel=1e-3, abs=1e-6)
    # A difference of two mean errors of about 1e-2, each in float32 to 1e-4 of itself, over the views' way.
    assert excesses[1] == pytest.approx(excesses[0], rel=1e-3, abs=1e-5)
    assert (found[1][1].int() - found[0][1].int()).abs().max() <= 1


def test_on_the_cpu_batches_are_bounded_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1))
    x = torch.zeros(1, 3, 256, 256)
    assert activation_bytes(network, lambda: network(x)) == 4 * 256**2 * (16 + 3)

    class Plain:
        def __init__(self) -> None:
            self.network = network

        def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
            return self.network(x)  # type: ignore[no-any-return]

    monkeypatch.setattr(fitting, "available_memory", lambda: 4 * 10 * 4 * 256**2 * (16 + 3) + 1)
    assert host_batch(Plain(), x, 512) == 10
    assert host_batch(Plain(), x, 4) == 4
    monkeypatch.setattr(fitting, "available_memory", lambda: None)
    assert host_batch(Plain(), x, 512) == 512

"""The training loop: its loss, what a batch is a function of, accumulation, the average."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy import stats

from mlflow_icr.extraction.keyed import keyed_rows
from trainers import batches
from trainers.batches import Order, draw_batch, rows_of
from trainers.config import load_config
from trainers.data import load_data
from trainers.families import family_of
from trainers.families.edm import edm_loss
from trainers.inputs import Inputs
from trainers.loop import new_state
from trainers.loop import train as steps_of
from trainers.optimizer import ema_beta


def unwrapped(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


def test_the_loss_is_edms_at_initialisation() -> None:
    """With D = 0 the weighted error is (sigma^2 + sd^2) / (sigma sd)^2 x^2; with F = 0 it is 1/sd^2 of what F should say."""

    class Zero:
        network = torch.nn.Identity()

        def __call__(self, x: torch.Tensor, sigma: object) -> torch.Tensor:
            return torch.zeros_like(x)

    x = torch.full((2, 1, 2, 2), 3.0)
    sigma = torch.tensor([0.5, 2.0])
    expected = np.mean([9 * (0.25 + 0.25) / 0.0625, 9 * (4 + 0.25) / 1.0])
    assert float(edm_loss(Zero(), x, sigma, torch.zeros_like(x), 0.5)) == pytest.approx(expected)


def test_noise_and_order_are_functions_of_the_seed_and_the_images_seen() -> None:
    config = load_config("digits", {"num_images": 50, "batch_size": 20})
    family, inputs = family_of(config), Inputs(torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1))
    seen = np.concatenate([draw_batch(inputs, Order(50, 0), family, at).clean(inputs).flatten() for at in range(0, 100, 20)])
    seen = ((seen + 1) * 127.5).round().astype(int)
    assert sorted(seen[:50]) == sorted(seen[50:]) == list(range(50))  # epochs, without gaps across batches
    assert not np.array_equal(seen[:50], seen[50:])
    a, b, c = (draw_batch(inputs, Order(50, 0), family, at) for at in (40, 40, 60))
    assert torch.equal(a.noise, b.noise)
    assert torch.equal(a.level, b.level)
    assert not torch.equal(a.noise, c.noise)
    logs = torch.cat([draw_batch(inputs, Order(50, 0), family, 20 * i).level for i in range(500)]).log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=4 * 1.2 / 100)
    assert float(logs.std()) == pytest.approx(1.2, rel=4 / (2 * 10_000) ** 0.5)


@pytest.mark.parametrize(("ranks", "parts"), [(1, 2), (4, 1), (3, 2)])
def test_a_rank_draws_its_rows_of_the_batch_and_no_others(ranks: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("digits", {"num_images": 50, "batch_size": 24, "dropout": 0.1, "labels": True, "augment": "flip"})
    images = torch.rand(50, 4, 3, 3)  # of latents, means and deviations
    family, inputs = family_of(config, 10), Inputs(images, torch.arange(50) % 10, images.flip(-1), latent=True, on_host=True)
    whole = draw_batch(inputs, Order(50, 0), family, 48)
    assert len({row.numpy().tobytes() for row in (*whole.noise, *unwrapped(whole.spread))}) == 48
    asked: list[int] = []
    monkeypatch.setattr(
        batches, "keyed_rows", lambda *key, rows, shape: asked.append(len(rows)) or keyed_rows(*key, rows=rows, shape=shape)
    )
    taken = []
    for rank in range(ranks):
        rows = rows_of(24, parts, rank, ranks)
        share = draw_batch(inputs, Order(50, 0), family, 48, rows)
        taken.append(rows)
        for part in range(parts):
            mine, expected = share.part(part, parts), whole.part(part, parts).part(rank, ranks)
            for name, value in vars(mine).items():
                if value is None:
                    assert getattr(expected, name) is None, name
                else:
                    assert torch.equal(value, getattr(expected, name)), name
            assert mine.mirrored is not None
            assert mine.dropout_keys is not None
    assert sorted(np.concatenate(taken)) == list(range(24))
    assert asked == [24 // ranks] * 2 * ranks


def test_rows_of_noise_are_normal_and_independent() -> None:
    noise = keyed_rows("noise", 3, 96, rows=range(256), shape=(2, 16, 16)).reshape(256, -1).astype(np.float64)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(noise)[np.triu_indices(256, 1)] * 512**0.5
    assert abs(correlation).max() < 6
    assert correlation.std() == pytest.approx(1, abs=0.02)  # four deviations of it, of 32 640 pairs
    assert not np.array_equal(noise[:1], keyed_rows("noise", 3, 97, rows=[0], shape=(512,)))


def test_accumulation_changes_nothing_but_rounding() -> None:
    data = load_data("digits", resolution=8, num_images=40, num_heldout=0, seed=0)
    results = []
    for parts in (1, 4):
        config = load_config("digits", {"batch_size": 32, "block_channels": [16, 32], "gradient_accumulation_steps": parts})
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
        state = new_state(family_of(config).build(1, 8), config, accelerator)
        steps = steps_of(state, Inputs(data.train), family_of(config), accelerator)
        for _ in range(5):
            next(steps)
        assert state.images_seen == 160
        results.append((float(state.loss_sum) / state.loss_steps, torch.cat([p.flatten() for p in state.ema.parameters()])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=2e-4, rtol=0)  # Adam's first steps magnify rounding


def test_ema_halflife_is_edms() -> None:
    config = load_config("digits", {"batch_size": 64, "ema_halflife_kimg": 1, "ema_rampup_ratio": 0.05})
    assert ema_beta(config.optimizer, 10_000) == pytest.approx(0.5 ** (64 / 500))
    assert ema_beta(config.optimizer, 10**6) == pytest.approx(0.5 ** (64 / 1000))

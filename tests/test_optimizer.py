"""The learning rate along a training, AdamW, clipping, gradient checkpointing, and the averages that are kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy import stats

from mlflow_icr.extraction.averages import Profile, power_beta, reconstructed, snapshots_of
from tests.family_runs import configured, weights
from trainers.checkpoint import load_checkpoint, save_checkpoint, state_tensors
from trainers.data import load_data
from trainers.families import family_of
from trainers.inputs import Inputs
from trainers.loop import TrainState, new_state, train
from trainers.optimizer import learning_rate_at


def trained(steps: int, name: str = "edm-labels", **changes: Any) -> tuple[TrainState, Any, Accelerator]:
    config = configured(name, labels=False, **changes)
    family, accelerator = family_of(config), Accelerator(cpu=True)
    images = load_data("digits", resolution=8, num_images=64, num_heldout=0, seed=0).train
    state = new_state(family.build(1, 8), config, accelerator)
    going = train(state, Inputs(images), family, accelerator)
    for _ in range(steps):
        next(going)
    going.close()
    return state, family, accelerator


def test_rates_fall_as_the_papers_say() -> None:
    def rate(at: int, **changes: Any) -> float:
        settings = {"total_kimg": 10, "rampup_kimg": 1, "batch_size": 100, "learning_rate": 2e-3, "lr_decay_kimg": 2}
        return learning_rate_at(configured("ddpm", **(settings | changes)).optimizer, at)

    assert rate(400) == pytest.approx(1e-3)
    assert rate(9000) == pytest.approx(2e-3)
    assert rate(5500, lr_decay="cosine") == pytest.approx(1e-3)
    assert rate(10_000, lr_decay="cosine") == pytest.approx(0, abs=1e-12)
    assert rate(1500, lr_decay="inverse_sqrt") == pytest.approx(2e-3)
    assert rate(8000, lr_decay="inverse_sqrt") == pytest.approx(2e-3 / math.sqrt(4))
    for flag, value, line in (
        ("lr_decay", "linear", "lr_decay is 'linear'; expected one of constant, cosine, inverse_sqrt"),
        ("betas", (0.9,), r"betas is \(0.9,\); expected two numbers in"),
        ("power_ema_stds", (0.4,), "power_ema_stds is 0.4; expected a relative width"),
    ):
        with pytest.raises(ValueError, match=line):
            configured("ddpm", **{flag: value})


def test_weights_decay_as_adamw_has_it() -> None:
    """Where the gradient is zero, a step of AdamW takes the share learning rate times decay, and nothing else."""
    state, _, _ = trained(0, learning_rate=0.1, weight_decay=0.5, betas=(0.5, 0.9))
    assert isinstance(state.optimizer.optimizer, torch.optim.AdamW)  # type: ignore[attr-defined]
    before = weights(state.network)
    for p in state.network.parameters():
        p.grad = torch.zeros_like(p)
    state.optimizer.step()
    torch.testing.assert_close(weights(state.network), before * (1 - 0.1 * 0.5))
    assert state.optimizer.param_groups[0]["betas"] == (0.5, 0.9)


def test_long_gradients_are_scaled_to_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.Adam.step

    def noted(self: torch.optim.Adam, closure: Any = None) -> Any:
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g["params"]])))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    trained(2, clip_norm=1e-2)
    assert norms == pytest.approx([1e-2, 1e-2], rel=1e-3)
    norms.clear()
    trained(1, clip_norm=1e6)
    assert 1e-2 < norms[0] < 1e6


@pytest.mark.parametrize("name", ["ddpm", "flow"])
def test_checkpointed_activations_change_nothing(name: str) -> None:
    found = [weights(trained(3, name, dropout=0.2, gradient_checkpointing=way)[0].network) for way in (False, True)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_masks_may_be_torchs_own() -> None:
    state, family, _ = trained(1, dropout=0.2, dropout_masks="torch")
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.2 for m in state.network.modules())
    assert state.dropout_keys.layers == 0
    assert family.config.network.dropout_masks == "torch"


def test_times_of_flow_are_logit_normal_and_shifted() -> None:
    def times(**changes: Any) -> np.ndarray:
        return family_of(configured("flow", **changes)).draw(np.random.default_rng(0), 20_000).double().numpy()

    t = times(time_distribution="logit_normal", time_mean=-0.5, time_std=0.8, time_shift=3.0)
    assert stats.kstest(np.log(t / (1 - t)) - math.log(3), "norm", args=(-0.5, 0.8)).pvalue > 1e-3
    assert stats.kstest(times(), "uniform").pvalue > 1e-3
    with pytest.raises(ValueError, match=r"time_shift is 3\.0; expected nothing for family edm"):
        configured("edm-labels", time_shift=3.0)


def test_averages_of_power_functions_are_kept_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    stds = (0.05, 0.1)
    whole, family, accelerator = trained(6, "flow", power_ema_stds=stds, batch_size=16)
    by_hand = {std: torch.zeros_like(weights(whole.network)) for std in stds}
    state, _, _ = trained(0, "flow", power_ema_stds=stds, batch_size=16)
    images = load_data("digits", resolution=8, num_images=64, num_heldout=0, seed=0).train
    going = train(state, Inputs(images), family, accelerator)
    for step in range(1, 4):
        next(going)
        for std, average in by_hand.items():
            beta = power_beta(std, 16 * step, 16)
            average.copy_(beta * average + (1 - beta) * weights(state.network))
    going.close()
    for std in stds:
        torch.testing.assert_close(torch.cat([w.flatten() for w in state.powers[std]]), by_hand[std])
    folder = save_checkpoint(tmp_path, state, family, accelerator, state_tensors(state, accelerator, {}))
    components, error = reconstructed(snapshots_of(tmp_path), Profile(0.1, 48))
    assert error < 1e-6
    saved = family.components(state.ema)["transformer"].state_dict()
    assert components["transformer"].keys() == saved.keys()  # with the copies that diffusers wants
    resumed, _, _ = trained(0, "flow", power_ema_stds=stds, batch_size=16)
    load_checkpoint(folder, resumed, accelerator)
    going = train(resumed, Inputs(images), family, accelerator)
    for _ in range(3):
        next(going)
    going.close()
    for std in stds:
        assert all(torch.equal(a, b) for a, b in zip(resumed.powers[std], whole.powers[std], strict=True))
    assert float(resumed.curve[0]) == pytest.approx(float(whole.curve[0]))
    assert resumed.curve_steps == whole.curve_steps == 6

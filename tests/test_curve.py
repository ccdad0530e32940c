"""The curve: points of what training was, from a thread of its own, that a resumption goes on with."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from mlflow_icr.tracking.logged import Logged
from tests.family_runs import configured
from trainers.curve import Curve
from trainers.data import load_data
from trainers.families import family_of
from trainers.inputs import Inputs
from trainers.loop import new_state, train
from trainers.optimizer import learning_rate_at


def test_points_are_of_their_steps_and_come_from_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured("edm-labels", labels=False, batch_size=16, rampup_kimg=0.1, clip_norm=1e-3)
    family, accelerator = family_of(config), Accelerator(cpu=True)
    images = load_data("digits", resolution=8, num_images=64, num_heldout=0, seed=0).train
    state = new_state(family.build(1, 8), config, accelerator)
    found: list[Logged] = []
    threads: set[str] = set()

    def log(row: Logged) -> None:
        threads.add(threading.current_thread().name)
        found.append(row)

    curve, losses, norms = Curve(3, accelerator, log), [], []
    steps = train(state, Inputs(images), family, accelerator)
    total_norm = torch.nn.utils.get_total_norm

    def noted(gradients: Any) -> torch.Tensor:
        norms.append(float(total_norm(gradients)))
        return torch.tensor(norms[-1])

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", noted)
    for step in range(7):
        if step == 4:
            loss = type(family).loss
            with monkeypatch.context() as broken:
                broken.setattr(type(family), "loss", lambda *given, loss=loss: loss(*given) * torch.nan)
                next(steps)
        else:
            next(steps)
            losses.append(float(state.loss_sum) - sum(losses) if step < 4 else 0.0)
        curve.step(state)
    curve.flush()
    curve.close()
    steps.close()
    assert [row.step for row in found] == [48, 96]
    assert threads == {"curve_0"}
    first, second = (row.values for row in found)
    assert first["curve/loss"] == pytest.approx(sum(losses[:3]) / 3)
    assert first["curve/gradient_norm"] == pytest.approx(sum(norms[:3]) / 3)
    assert first["curve/learning_rate"] == pytest.approx(learning_rate_at(config.optimizer, 32))
    assert first["curve/skipped_steps"] == 0
    assert first["curve/images_per_second"] > 0
    assert 0 < first["curve/memory_gib"] < 100
    assert "curve/loss" not in second  # one of its steps had none
    assert second["curve/skipped_steps"] == 1
    assert second["curve/gradient_norm"] == pytest.approx((norms[3] + norms[5]) / 2)


def test_what_logging_raises_is_raised_in_the_training() -> None:
    def full(row: Logged) -> None:
        raise OSError(28, "No space left on device")

    config = configured("edm-labels", labels=False)
    family, accelerator = family_of(config), Accelerator(cpu=True)
    state = new_state(family.build(1, 8), config, accelerator)
    curve = Curve(1, accelerator, full)
    state.curve_steps, state.images_seen = 1, 32
    curve.step(state)
    with pytest.raises(OSError, match="No space left"):
        curve.flush()
    silent = Curve(0, accelerator, full)
    state.curve_steps = 5
    silent.step(state)
    silent.flush()
    for one in (curve, silent):
        one.close()

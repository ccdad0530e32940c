"""Training that diverges: steps without finite gradients change nothing, are counted, and end the run in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from mlflow_icr.tracking import read_history
from tests.training import errors_of, run, run_here
from trainers.agreement import LateReading
from trainers.checkpoint import not_finite
from trainers.config import load_config
from trainers.families import family_of
from trainers.inputs import Inputs
from trainers.loop import new_state, take_mean_loss, train


@pytest.mark.parametrize("later_step", [0, 2])
def test_a_gradient_that_is_not_finite_changes_no_weight_and_no_moment(
    later_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("digits", {"block_channels": (8, 16), "batch_size": 4, "num_images": 8})
    family = family_of(config, None)
    accelerator = Accelerator(cpu=True)
    state = new_state(family.build(1, 8), config, accelerator)
    inputs = Inputs(torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8))
    steps = train(state, inputs, family, accelerator)
    for _ in range(later_step):
        next(steps)
    before = [p.detach().clone() for p in state.network.parameters()]
    moments = [v.clone() for entry in state.optimizer.state_dict()["state"].values() for v in entry.values()]
    loss = type(family).loss
    with monkeypatch.context() as broken:
        broken.setattr(type(family), "loss", lambda *given: loss(*given) * torch.nan)
        next(steps)
    assert state.skipped.tolist() == [1, 1]
    assert all(torch.equal(p, old) for p, old in zip(state.network.parameters(), before, strict=True))
    if later_step:
        now = [v for entry in state.optimizer.state_dict()["state"].values() for v in entry.values()]
        assert all(torch.equal(a, b) for a, b in zip(now, moments, strict=True))
    mean = take_mean_loss(state, accelerator)
    assert mean is not None
    assert mean != mean
    next(steps)
    assert state.skipped.tolist() == [1, 0]
    assert not any(torch.equal(p, old) for p, old in zip(state.network.parameters(), before, strict=True) if p.numel() > 100)
    assert state.optimizer_steps == later_step + 2
    assert not_finite({"loss_sum": torch.tensor([torch.nan]), "a": torch.ones(2)}) == ""
    assert not_finite({"a": torch.ones(2), "network/x": torch.tensor([1.0, torch.inf])}) == "network/x"
    steps.close()


def test_a_reading_of_a_number_on_the_cpu_is_not_late() -> None:
    reading = LateReading()
    reading.poll(torch.tensor(3))
    assert reading.value == 3


def test_a_learning_rate_far_too_high_ends_in_one_line_and_a_lower_one_goes_on(tmp_path: Path) -> None:
    with errors_of():
        failed = run_here(tmp_path, "--learning-rate=1e6", "--measurements=2")
    assert failed.returncode == 1
    errors = [line for line in failed.stderr.splitlines() if "trainers.train: error" in line or "Traceback" in line]
    assert len(errors) == 1, failed.stderr
    assert "learning_rate is 1e+06" in errors[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000000000"]
    rows = read_history(tmp_path)
    assert rows[-1]["train/skipped_steps"] > 0
    assert "loss/train" not in rows[-1]
    with errors_of():
        done = run_here(tmp_path, "--resume", "--learning-rate=1e-3", "--total-kimg=0.9")
    assert done.returncode == 0, done.stderr
    rows = read_history(tmp_path)
    assert rows[-1]["train/optimizer_steps"] == rows[-1]["images_seen"] / 32 == 29
    assert rows[-1]["train/batch_size"] == 32
    assert "loss/train" in rows[-1]
    assert "train/skipped_steps" not in rows[-1]


@pytest.mark.slow
def test_ranks_that_diverge_end_in_one_line_and_a_lower_rate_goes_on(tmp_path: Path) -> None:
    line = ["--num-processes=2", "--family=ddpm", "--measurements=2", "--power-ema-stds=0.1", "--resume", "auto"]
    failed = run(tmp_path, *line, "--learning-rate=1e30")
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("trainers.train: error: learning_rate is 1e+30: the gradients of")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000000000"]
    done = run(tmp_path, *line, "--learning-rate=1e-3", "--total-kimg=0.4")
    assert done.returncode == 0, done.stderr
    rows = read_history(tmp_path)
    assert rows[-1]["images_seen"] == 416
    assert "loss/train" in rows[-1]

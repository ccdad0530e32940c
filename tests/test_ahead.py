"""Drawing ahead of the step: what is drawn, in which thread, and what becomes of it; and how networks lie in memory."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.family_runs import configured, weights
from trainers.batches import Ahead, Batch
from trainers.checkpoint import load_checkpoint, save_checkpoint, state_tensors
from trainers.data import load_data
from trainers.engine import use_channels_last
from trainers.families import Family, family_of
from trainers.families.edm import EDM
from trainers.inputs import Inputs
from trainers.loop import TrainState, new_state, train


class Counting(EDM):
    """EDM whose draws are counted, and fail from a batch on."""

    def __init__(self, config: Any, broken: int) -> None:
        super().__init__(config)
        self.broken, self.drawn, self.threads = broken, 0, set[str]()
        self.second = threading.Event()

    def draw(self, generator: np.random.Generator, count: int) -> Tensor:
        self.drawn += 1
        self.threads.add(threading.current_thread().name)
        if self.drawn == 2:
            self.second.set()
        if self.drawn >= self.broken:
            raise RuntimeError(f"batch {self.drawn} cannot be drawn")
        return super().draw(generator, count)


@pytest.fixture
def images() -> Tensor:
    return load_data("digits", resolution=8, num_images=64, num_heldout=0, seed=0).train


def begun(family: Family, network: torch.nn.Module | None = None) -> tuple[TrainState, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    return new_state(network or family.build(1, 8), family.config, accelerator), accelerator


def drawing_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("draw")]


def test_the_next_batch_is_drawn_while_a_step_goes_on_and_its_errors_are_the_steps(images: Tensor) -> None:
    family = Counting(configured("edm-labels", labels=False), broken=4)
    state, accelerator = begun(family)
    steps = train(state, Inputs(images), family, accelerator)
    next(steps)
    assert family.second.wait(60)
    assert family.threads == {"draw_0"}
    assert drawing_threads()
    for _ in range(2):
        next(steps)
    with pytest.raises(RuntimeError, match="batch 4 cannot be drawn"):
        next(steps)
    assert state.images_seen == 3 * family.config.optimizer.batch_size
    assert not drawing_threads()


def test_a_loop_that_is_closed_or_breaks_leaves_no_thread_behind(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of(configured("ddpm"))
    state, accelerator = begun(family)
    steps = train(state, Inputs(images), family, accelerator)
    next(steps)
    assert drawing_threads()
    steps.close()
    assert not drawing_threads()

    def broken(*_: object) -> Tensor:
        raise RuntimeError("the device is out of memory")

    monkeypatch.setattr(family, "loss", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(train(state, Inputs(images), family, accelerator))
    assert not drawing_threads()


def test_a_state_that_was_put_back_gets_the_batch_of_its_place() -> None:
    asked: list[int] = []

    def draw(images_seen: int) -> list[Batch]:
        asked.append(images_seen)
        return [Batch(torch.tensor([images_seen]), torch.zeros(1), torch.zeros(1))]

    with Ahead(draw, 10, torch.device("cpu")) as drawn:
        found = [int(drawn(at)[0].indices) for at in (0, 10, 20, 10, 20, 0)]
    assert found == [0, 10, 20, 10, 20, 0]
    assert asked[:4] == [0, 10, 20, 30]  # each once, while nothing is put back


def test_channels_last_changes_neither_results_nor_checkpoints_nor_what_a_resumption_computes(
    images: Tensor, tmp_path: Path
) -> None:
    """The layout that convolutions get on CUDA, on the CPU, whose fused Adam is as easily misled by layouts."""
    family = family_of(configured("ddpm-v-labels", labels=False))

    def network(channels_last: bool) -> Any:
        built: Any = family.build(1, 8)
        return built.to(memory_format=torch.channels_last) if channels_last else built

    def kernel(module: Any) -> Tensor:
        return module.down_blocks[0].resnets[0].conv1.weight  # type: ignore[no-any-return]

    found = []
    for channels_last in (False, True):
        state, accelerator = begun(family, network(channels_last))
        assert kernel(state.ema).is_contiguous(memory_format=torch.channels_last) == channels_last
        steps = train(state, Inputs(images), family, accelerator)
        for _ in range(4):
            next(steps)
            if state.images_seen == 64:
                folder = save_checkpoint(
                    tmp_path / str(channels_last), state, family, accelerator, state_tensors(state, accelerator, {})
                )
        found.append((float(state.loss_sum), state, folder))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    saved = [load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for *_, folder in found]
    for key, value in saved[0].items():
        assert saved[1][key].is_contiguous()
        torch.testing.assert_close(saved[1][key], value, rtol=0, atol=1e-3)
    state, accelerator = begun(family, network(True))
    load_checkpoint(found[1][2], state, accelerator)
    moment = state.optimizer.state[kernel(state.network)]["exp_avg"]
    assert moment.stride() == kernel(state.network).stride()
    steps = train(state, Inputs(images), family, accelerator)
    for _ in range(2):
        next(steps)
    assert torch.equal(weights(state.network), weights(found[1][1].network))
    assert torch.equal(weights(state.ema), weights(found[1][1].ema))


def test_on_the_cpu_networks_keep_their_layout() -> None:
    family = family_of(configured("ddpm"))
    network: Any = family.build(1, 8)
    _, accelerator = begun(family)
    use_channels_last(network, accelerator)
    assert network.down_blocks[0].resnets[0].conv1.weight.is_contiguous()

"""The same training however it is run: on how many ranks, in how many parts, sharded, compiled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from mlflow_icr import EDMDenoiser, ICRMonitor, Protocol
from tests.servers import free_port
from trainers.config import load_config

STEPS = 20


def _train(rank: int, folder: str, ranks: int, port: int, parts: int, engine: str) -> None:
    """Some steps, and a measurement of the average; rank 0 leaves losses, values and average weights in the folder."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = engine if engine in ("aot_eager", "inductor") else "no"
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    from tests.training import errors_of, process_as_it_was
    from trainers.checkpoint import state_tensors
    from trainers.data import data_of
    from trainers.engine import is_sharded
    from trainers.families import family_of
    from trainers.inputs import inputs_of
    from trainers.loop import new_state, take_mean_loss, whole_average
    from trainers.loop import train as steps_of

    config = load_config(
        "digits",
        {
            "num_images": 48,
            "block_channels": (8, 16),
            "batch_size": 32,
            "rampup_kimg": 0.4,
            "dropout": 0.13,
            "augment": "edm",
            "gradient_accumulation_steps": parts,
        },
    )
    with process_as_it_was():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
        if engine == "fsdp":  # Accelerate offers it for devices only; its own code for them does the rest
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="NO_WRAP")
        data = data_of(config)
        inputs, family = inputs_of(config, data, None, accelerator.device), family_of(config, data.num_classes)
        state = new_state(family.build(*inputs.shape[:2]), config, accelerator)
        assert is_sharded(state.network) == (engine == "fsdp")
        assert hasattr(state.network, "_orig_mod") == (engine in ("aot_eager", "inductor"))
        losses, steps = [], steps_of(state, inputs, family, accelerator)
        for _ in range(STEPS):
            next(steps)
            losses.append(take_mean_loss(state, accelerator))
        if engine == "fsdp":  # between measurements no rank has the whole average
            assert state.shares is not None
            assert sum(share.numel() for share in state.shares) < 0.6 * sum(p.numel() for p in family.build(1, 8).parameters())
        with whole_average(state, accelerator), errors_of():
            monitor = ICRMonitor(EDMDenoiser(state.ema), data.train, Protocol(num_images=48, num_views=4))
            report = monitor.measure(state.images_seen)
        tensors = state_tensors(state, accelerator, {})
        if rank == 0:
            values = {key: value for key, value in report.values.items() if key.startswith("repr/")}
            torch.save({"losses": losses, "values": values, "tensors": tensors}, f"{folder}/{ranks}-{parts}-{engine}.pt")
        steps.close()
        if ranks > 1:
            torch.distributed.destroy_process_group()


def _train_several(rank: int, folder: str, ports: tuple[int, int]) -> None:
    """What two processes do that need not import everything again: each a training of its own, then two together."""
    _train(0, folder, 1, 0, 1, ("plain", "aot_eager")[rank])
    _train(rank, folder, 2, ports[0], 2, "plain")
    _train(rank, folder, 2, ports[1], 1, "fsdp")


def _run_sharded(rank: int, folder: str, port: int) -> None:
    """A run on two ranks that have shares of the parameters; stopped after a checkpoint, gone on with, and one in one go."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    from tests.family_runs import configured
    from trainers import run as module
    from trainers.checkpoint import SHARES, state_tensors
    from trainers.console import Console

    def sharding(**options: object) -> Accelerator:
        accelerator = Accelerator(**options)  # type: ignore[arg-type]
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="NO_WRAP")
        return accelerator

    module.Accelerator = sharding  # type: ignore[misc,assignment]
    config = configured("ddpm", power_ema_stds=(0.1,), dropout=0.1)
    found = []
    for name, stops in (("whole", (False,)), ("parts", (True, False))):
        for stop in stops:
            run = module.Run(config, Path(folder) / name, resume=name == "parts" and not stop)
            asked = iter(range(100))
            run.train_to_end(None, Console(config, shown=False), lambda asked=asked, stop=stop: stop and next(asked) >= 1)
        found.append(state_tensors(run.state, run.accelerator, {}))
    places = sorted(path.name for path in (Path(folder) / "parts" / "checkpoints").glob(f"*/{SHARES}/*"))
    assert len(places) == 4, places  # of two checkpoints, a file of each rank
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0] if key != "curve")
    if rank == 0:
        torch.save(found[0], f"{folder}/state.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_run_is_saved_by_its_ranks_and_goes_on(tmp_path: Path) -> None:
    from tests.family_runs import configured, started
    from trainers.checkpoint import latest_checkpoint, load_checkpoint, state_tensors

    multiprocessing.spawn(_run_sharded, (str(tmp_path), free_port()), nprocs=2)
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    _, state, accelerator = started(configured("ddpm", power_ema_stds=(0.1,), dropout=0.1))
    folder = latest_checkpoint(tmp_path / "parts")
    assert folder is not None
    load_checkpoint(folder, state, accelerator)  # one rank, with everything
    here = state_tensors(state, accelerator, {})
    assert all(
        torch.equal(here[key], found[key]) for key in here if key.startswith(("network/", "ema/", "power/", "optimizer/"))
    )
    assert len([key for key in here if key.startswith("optimizer/")]) == 3 * len([k for k in here if k.startswith("network/")])


Trained = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the trainings of the default tests have left what they came to."""
    folder = tmp_path_factory.mktemp("engines")
    multiprocessing.spawn(_train_several, (str(folder), (free_port(), free_port())), nprocs=2)
    return folder


def trained(folder: Path, ranks: int, parts: int, engine: str) -> Trained:
    path = folder / f"{ranks}-{parts}-{engine}.pt"
    if not path.exists():
        multiprocessing.spawn(_train, (str(folder), ranks, free_port(), parts, engine), nprocs=ranks)
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("ranks", "parts", "engine"),
    [
        (2, 2, "plain"),
        pytest.param(4, 1, "plain", marks=pytest.mark.slow),
        (2, 1, "fsdp"),
        (1, 1, "aot_eager"),
        pytest.param(1, 1, "inductor", marks=pytest.mark.slow),  # a C++ compiler's time
    ],
)
def test_ranks_parts_and_engines_change_nothing_but_rounding(folder: Path, ranks: int, parts: int, engine: str) -> None:
    one, other = trained(folder, 1, 1, "plain"), trained(folder, ranks, parts, engine)
    assert other["losses"] == pytest.approx(one["losses"], rel=1e-4)
    # An excess is a difference of errors, near 0 here: the rounding is that of the errors, which are of the order of 1.
    assert other["values"] == pytest.approx(one["values"], rel=1e-4, abs=1e-5)
    assert other["tensors"].keys() == one["tensors"].keys()

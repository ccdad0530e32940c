"""What runs on a CUDA device is what runs on the CPU; and there nothing in a step waits for the device.

MLFLOW_ICR_TEST_DEVICE=cpu puts the CPU in the device's place, to try these tests themselves where there is none.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from mlflow_icr import (
    ICRMonitor,
    LossMonitor,
    Protocol,
    density_coverage,
    frechet_distance,
    kernel_distance,
    memorization_ratio,
)
from mlflow_icr.generation.neighbours import k_nearest
from tests.family_runs import FAMILIES, configured, weights
from tests.training import SHORT, measured
from trainers import loop
from trainers.batches import Batch
from trainers.checkpoint import load_checkpoint, save_checkpoint, state_tensors
from trainers.data import DataSet, load_data
from trainers.engine import bare
from trainers.families import family_of
from trainers.inputs import Inputs
from trainers.loop import new_state, take_mean_loss, train

DEVICE = os.environ.get("MLFLOW_ICR_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device (MLFLOW_ICR_TEST_DEVICE=cpu tries some)"
)
on_cuda_only = pytest.mark.skipif(DEVICE != "cuda", reason="says something of CUDA only")
if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when cuBLAS starts: what deterministic sums need
LATENT = "flow-latent"


@cache
def data() -> DataSet:
    return load_data("digits", resolution=8, num_images=64, num_heldout=32, seed=0)


def _forget() -> None:
    """Accelerate has one state in a process, which says on which device: each training here begins with a new one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """float32 is float32 here: PyTorch's own choice for convolutions is TF32, with 10 bits behind the point."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    _forget()


@contextmanager
def deterministic() -> Iterator[None]:
    """Sums are in the same order each time, where the device has an algorithm for it; else RuntimeError."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Training:
    """A short training of a family on a device; a later one takes Accelerate's state over."""

    def __init__(self, name: str, device: str = DEVICE, precision: str = "no", compiler: str = "no", **changes: Any) -> None:
        _forget()
        self.config = configured("flow-labels" if name == LATENT else name, **changes)
        self.accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision, dynamo_backend=compiler)
        assert self.accelerator.device.type == device
        self.family = family_of(self.config, 10)
        images = data().train
        if name == LATENT:
            images = torch.rand(64, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        labels = data().train_labels if self.config.network.labels else None
        self.inputs = Inputs(images, labels, latent=name == LATENT)
        self.state = new_state(self.family.build(*self.inputs.shape[:2]), self.config, self.accelerator)
        self.steps = train(self.state, self.inputs, self.family, self.accelerator)

    def run(self, count: int) -> list[float]:
        """The losses of some steps."""
        losses = []
        for _ in range(count):
            next(self.steps)
            loss = take_mean_loss(self.state, self.accelerator)
            assert loss is not None
            losses.append(loss)
        return losses

    def save(self, folder: Path) -> Path:
        tensors = state_tensors(self.state, self.accelerator, {})
        return save_checkpoint(folder, self.state, self.family, self.accelerator, tensors)


@pytest.mark.parametrize("name", [*FAMILIES, LATENT])
def test_steps_of_each_family_are_those_of_the_cpu(name: str) -> None:
    losses = {device: Training(name, device, rampup_kimg=1).run(3) for device in ("cpu", DEVICE)}
    assert losses[DEVICE] == pytest.approx(losses["cpu"], rel=1e-3)


def test_images_live_on_the_device_and_the_rest_comes_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    places, clean = set(), Batch.clean

    def noted(batch: Batch, inputs: Inputs) -> Tensor:
        places.update({inputs.images.device.type, batch.noise.device.type, batch.indices.device.type})
        return clean(batch, inputs)

    monkeypatch.setattr(Batch, "clean", noted)
    training = Training("flow-labels")
    training.run(2)
    training.steps.close()
    assert places == {DEVICE}
    assert training.inputs.images.device.type == "cpu"  # the caller's are where they were
    if DEVICE == "cuda":
        batch = Batch(torch.arange(3), torch.zeros(3), torch.zeros(3, 1, 2, 2)).pinned()
        assert all(part.is_pinned() for part in (batch.indices, batch.level, batch.noise))


@on_cuda_only
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("name", [*FAMILIES, LATENT])
def test_nothing_in_a_step_waits_for_the_device(name: str, precision: str) -> None:
    training = Training(name, precision=precision, dropout=0.1)
    training.run(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            next(training.steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert training.state.images_seen == 6 * training.config.optimizer.batch_size


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=on_cuda_only)])
@pytest.mark.parametrize("name", ["edm-labels", "flow-labels"])
def test_mixed_precision_trains_and_goes_on_from_a_checkpoint(name: str, precision: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"learning_rate": 3e-3, "dropout": 0.1}
    with deterministic():
        first = Training(name, precision=precision, **changes)
        denoiser = first.family.denoiser(first.state.network)
        judge = LossMonitor(
            denoiser, lambda *a: first.family.loss(denoiser, *a), first.family.draw, data().train, data().train
        )  # fmt: skip
        before = judge.measure(0).values["loss/train_eval"]
        losses = first.run(30)
        folder = first.save(tmp_path)
        losses += first.run(10)
        assert all(0 < loss < float("inf") for loss in losses)
        assert judge.measure(1).values["loss/train_eval"] < 0.8 * before
        assert first.state.network.dtype == torch.float32  # what is learned is kept in full
        second = Training(name, precision=precision, **changes)
        load_checkpoint(folder, second.state, second.accelerator)
        assert second.run(10) == losses[30:]
    for network in ("network", "ema"):
        a, b = (weights(bare(getattr(t.state, network), t.accelerator)) for t in (first, second))
        assert torch.equal(a, b)


@on_cuda_only
@pytest.mark.parametrize("name", ["edm-labels", "ddpm"])
def test_convolutions_lie_channels_last_and_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(name, rampup_kimg=1)
    flags = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        flags.append(output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous())

    for network in (bare(training.state.network, training.accelerator), training.state.ema):
        convolution: Any = network.get_submodule("down_blocks.0.resnets.0.conv1")
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
        assert not convolution.weight.is_contiguous()
        convolution.register_forward_hook(note)
    losses = training.run(10)
    assert flags == [True] * 10
    kernel: Any = bare(training.state.network, training.accelerator).get_submodule("down_blocks.0.resnets.0.conv1").weight
    assert training.state.optimizer.state[kernel]["exp_avg"].stride() == kernel.stride()
    monkeypatch.setattr(loop, "use_channels_last", lambda network, accelerator: None)
    other = Training(name, rampup_kimg=1)
    assert bare(other.state.network, other.accelerator).get_submodule("down_blocks.0.resnets.0.conv1").weight.is_contiguous()
    assert other.run(10) == pytest.approx(losses, rel=1e-3)


def test_measurements_are_those_of_the_cpu() -> None:
    training = Training("edm-labels", "cpu", learning_rate=3e-3)
    training.run(20)
    found = {}
    for device in ("cpu", DEVICE):
        denoiser: Any = training.family.denoiser(copy.deepcopy(training.state.ema).to(device))
        monitor = ICRMonitor(denoiser, data().train, Protocol(num_images=64, num_views=4), companions=("rankme", "lidar"))
        loss = LossMonitor(
            denoiser, lambda *a, d=denoiser: training.family.loss(d, *a), training.family.draw, data().train, data().heldout
        )
        report = monitor.measure(1).joined(loss.measure(1))
        assert not report.absent
        found[device] = {key: value for key, value in report.values.items() if not key.startswith("perf/")}
    assert found[DEVICE].keys() == found["cpu"].keys()
    for key, value in found["cpu"].items():
        # An eigenvalue may change its sign; a gap is a small difference.
        slack = {"repr/indefinite_fraction": 2 / 32, "loss/gap": 1e-3 * found["cpu"]["loss/heldout"]}.get(key, 0.0)
        assert found[DEVICE][key] == pytest.approx(value, rel=1e-3, abs=slack), key


def test_distances_and_neighbours_are_those_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 24, generator=generator), torch.randn(400, 24, generator=generator) * 1.1 + 0.2
    y[7] = x[3]  # a copy
    x_there, y_there = x.to(DEVICE), y.to(DEVICE)
    assert frechet_distance(x_there, y_there) == pytest.approx(frechet_distance(x, y), rel=1e-6)
    assert kernel_distance(x_there, y_there, subset_size=200) == pytest.approx(kernel_distance(x, y, subset_size=200), rel=1e-5)
    assert density_coverage(x_there, y_there) == pytest.approx(density_coverage(x, y), rel=1e-6)
    here, there = k_nearest(x, y, 5), k_nearest(x_there, y_there, 5)
    assert torch.equal(here.indices, there.indices.cpu())
    torch.testing.assert_close(here.distances, there.distances.cpu(), rtol=1e-12, atol=0)
    assert float(there.distances[3, 0]) == 0
    ratio = [memorization_ratio(a, b) for a, b in ((x, y), (x_there, y_there))]
    assert ratio[0].value == ratio[1].value
    torch.testing.assert_close(ratio[0].scores, ratio[1].scores.cpu(), rtol=1e-9, atol=0)


def can_compile() -> bool:
    """Whether there is what inductor and Triton build their kernels with."""
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return headers.exists() and any(shutil.which(name) for name in ("cc", "gcc", "clang"))


@on_cuda_only
@pytest.mark.skipif(not can_compile(), reason="there is no C compiler, or no Python.h, which Triton needs")
def test_a_compiled_network_trains_and_is_measured_as_it_is_without() -> None:
    found = []
    for compiler in ("no", "inductor"):
        training = Training("edm-labels", compiler=compiler, rampup_kimg=1)
        assert hasattr(training.state.network, "_orig_mod") == (compiler == "inductor")
        losses = training.run(20)
        raw: Any = training.family.denoiser(bare(training.state.network, training.accelerator))
        ema: Any = training.family.denoiser(training.state.ema)
        report = ICRMonitor(ema, data().train, Protocol(num_images=64, num_views=4), raw=raw).measure(1)
        found.append((losses, report.values["repr/icr"], report.values["repr_raw/icr"]))  # both taps have fired
        assert training.run(1)[0] > 0  # and training goes on
    torch._dynamo.reset()
    for eager, compiled in zip(*found, strict=True):
        assert compiled == pytest.approx(eager, rel=1e-3)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=on_cuda_only)])
def test_nccl_trains_what_the_cpu_does(ranks: int, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    if DEVICE == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need as many CUDA devices, and there is one")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NVIDIA_TF32_OVERRIDE": "0", "GLOO_SOCKET_IFNAME": "lo"}
    cases: dict[str, tuple[list[str], dict[str, str]]] = {
        "cpu": (["-m"], {"CUDA_VISIBLE_DEVICES": ""}),
        "device": (launch, {"NCCL_SOCKET_IFNAME": "lo"} | ({} if DEVICE == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})),
    }
    for name, (words, changes) in cases.items():
        command = [sys.executable, *words, "trainers.train", *SHORT, f"--output-dir={tmp_path / name}", f"--run-name={name}"]
        done = subprocess.run(command, env=environment | changes, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
    if DEVICE == "cuda":
        params = {run.info.run_name: run.data.params for run in MlflowClient().search_runs(["0"])}
        assert params["device"]["device"] == "cuda"
        assert params["device"]["distributed_type"] == "MULTI_GPU"  # a process group of NCCL, also of one rank
        assert params["device"]["world_size"] == str(ranks)
        assert params["cpu"]["device"] == "cpu"
    one, other = measured(tmp_path / "cpu"), measured(tmp_path / "device")
    assert [row["images_seen"] for row in one] == [row["images_seen"] for row in other]
    for a, b in zip(one, other, strict=True):
        for key in ("repr/icr", "repr/trace_residual", "repr/view_error_ratio", "loss/train_eval", "loss/heldout"):
            assert b[key] == pytest.approx(a[key], rel=1e-2), (a["images_seen"], key)

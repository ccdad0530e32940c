"""Runs of the model families: measured again post hoc, resumed, on two ranks, and in latents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from mlflow_icr.cli import main
from mlflow_icr.extraction.latents import Autoencoder, LatentCache, encode_images
from mlflow_icr.extraction.views import make_views
from mlflow_icr.tracking import read_history
from tests.family_runs import (
    FAMILIES,
    SHORT,
    as_folder,
    configured,
    finished,
    started,
    tiny_autoencoder,
    weights,
)
from trainers.checkpoint import load_checkpoint, save_checkpoint, state_tensors
from trainers.data import load_data
from trainers.inputs import Inputs
from trainers.loop import train


@pytest.fixture
def digits_inputs() -> Inputs:
    data = load_data("digits", resolution=8, num_images=64, num_heldout=0, seed=0)
    return Inputs(data.train, data.train_labels)


@pytest.mark.parametrize("name", ["ddpm-v-labels", "flow-labels"])
def test_a_run_is_measured_again_from_its_checkpoint(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(configured(name), tmp_path / "run")
    assert [row["images_seen"] for row in run.rows] == [0, 160, 320]
    assert {"loss/heldout", "mem/ratio_l2", "repr/icr", "repr/view_error_ratio"} <= run.rows[-1].keys()
    data = as_folder(run.data.train, tmp_path / "data")
    capsys.readouterr()
    checkpoint = tmp_path / "run" / "checkpoints" / "000000000320"
    assert main(["measure", str(checkpoint), "--data", str(data), "--num-views", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    for key in ("repr/icr", "repr/icr_debiased", "repr/view_error_ratio"):
        assert found[key] == pytest.approx(run.rows[-1][key], rel=1e-4), key


@pytest.mark.parametrize("name", ["ddpm", "flow-labels"])
def test_a_resumed_training_is_the_uninterrupted_one(name: str, tmp_path: Path, digits_inputs: Inputs) -> None:
    config = configured(name)
    inputs = digits_inputs if config.network.labels else Inputs(digits_inputs.images)
    family, state, accelerator = started(config)
    steps = train(state, inputs, family, accelerator)
    for _ in range(3):
        next(steps)
    folder = save_checkpoint(tmp_path, state, family, accelerator, state_tensors(state, accelerator, {}))
    for _ in range(3):
        next(steps)
    _, other, accelerator = started(config)
    load_checkpoint(folder, other, accelerator)
    steps = train(other, inputs, family, accelerator)
    for _ in range(3):
        next(steps)
    assert other.images_seen == state.images_seen == 6 * 32
    assert torch.equal(weights(other.network), weights(state.network))
    assert torch.equal(weights(other.ema), weights(state.ema))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm-v-labels", "flow-labels"])
def test_two_ranks_train_one_run(name: str, tmp_path: Path) -> None:
    one = finished(configured(name), tmp_path / "one").rows
    flags = [f"--{key.replace('_', '-')}={','.join(map(str, v)) if isinstance(v, list) else v}"
             for key, v in {**SHORT, **FAMILIES[name]}.items()]  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "trainers.train", "--preset=digits"]
    command = [sys.executable, *launch, *flags, f"--output-dir={tmp_path / 'two'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    two = read_history(tmp_path / "two")
    assert [row["images_seen"] for row in two] == [row["images_seen"] for row in one]
    for a, b in zip(one, two, strict=True):
        for key in ("loss/train", "loss/heldout", "repr/icr"):
            if key in a:  # gradients are summed in another order, in float32
                assert b[key] == pytest.approx(a[key], rel=2e-3), key


# Latents


def test_latents_are_normalised_as_diffusers_does_and_views_are_augmented_before(digits: Tensor) -> None:
    network: Any = tiny_autoencoder()
    autoencoder = Autoencoder(network, batch_size=3)
    x = digits[:7].float() / 127.5 - 1
    with torch.no_grad():
        posterior = network.encode(x).latent_dist
        expected = torch.cat([(posterior.mean - 0.1) * 0.7, posterior.std * 0.7], 1)
    moments = encode_images(autoencoder, digits[:7])
    torch.testing.assert_close(moments, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        decoded = network.decode(posterior.mean).sample
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(x)), decoded, rtol=1e-4, atol=1e-4)
    plain = make_views(digits[:4], range(4), num_views=3, sigma=0, seed=0)
    clean, noised = (make_views(digits[:4], range(4), num_views=3, sigma=s, seed=0, encode=autoencoder.encode) for s in (0, 2))
    assert clean.shape == (4, 3, 2, 4, 4)
    torch.testing.assert_close(clean.flatten(0, 1), autoencoder.encode(plain.flatten(0, 1)), rtol=1e-4, atol=1e-5)
    assert float(((noised - clean) / 2).std()) == pytest.approx(1, rel=4 / (2 * clean.numel()) ** 0.5)


def test_latents_are_kept_by_what_they_are_of(tmp_path: Path, digits: Tensor) -> None:
    cache, autoencoder = LatentCache(tmp_path), Autoencoder(tiny_autoencoder())
    moments = encode_images(autoencoder, digits[:5])
    assert cache.find(autoencoder, digits[:5]) is None
    cache.keep(autoencoder, digits[:5], moments)
    found = cache.find(autoencoder, digits[:5])
    assert found is not None
    assert torch.equal(found, moments)
    assert cache.find(autoencoder, digits[1:6]) is None
    assert cache.find(Autoencoder(tiny_autoencoder(seed=1)), digits[:5]) is None
    path = cache.path(autoencoder, digits[:5])
    assert path is not None
    path.write_bytes(path.read_bytes()[:100])
    assert cache.find(autoencoder, digits[:5]) is None


def test_latent_runs_train_measure_and_save_what_diffusers_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ICR_CACHE", str(tmp_path / "cache"))
    tiny_autoencoder().save_pretrained(tmp_path / "autoencoder")
    changes = {"autoencoder": str(tmp_path / "autoencoder")}
    run = finished(configured("ddpm", **changes), tmp_path / "run")
    assert run.inputs.shape == (2, 4, 4)
    assert {"loss/heldout", "mem/ratio_l2", "repr/icr"} <= run.rows[-1].keys()
    (kept,) = (tmp_path / "cache").glob("latents-*/*.safetensors")
    written = kept.stat().st_mtime_ns
    other = finished(configured("flow-labels", patch_size=1, **changes), tmp_path / "flow")
    assert kept.stat().st_mtime_ns == written
    assert torch.equal(other.inputs.images, run.inputs.images)
    parts = [tmp_path / "run" / "checkpoints" / name / "vae" for name in ("000000000000", "000000000320")]
    assert os.path.samefile(*(part / "diffusion_pytorch_model.safetensors" for part in parts))
    for made in ("run", "flow"):
        pipeline: Any = DiffusionPipeline.from_pretrained(
            tmp_path / made / "checkpoints" / "000000000320", trust_remote_code=True
        )
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)
    data = as_folder(run.data.train, tmp_path / "data")
    capsys.readouterr()
    assert main(["measure", str(parts[1].parent), "--data", str(data), "--num-views", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    for key in ("repr/icr", "repr/view_error_ratio"):
        assert found[key] == pytest.approx(run.rows[-1][key], rel=1e-4), key

"""Weights in everybody's formats: tiny networks of Stable Diffusion, XL, 3 and Flux, compared by what they say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mlflow_icr.integrations.checkpoint_files import CheckpointFiles, Kind, Position, entries_of
from mlflow_icr.integrations.saved import SavedTraining
from tests import tiny_models
from tests import trainer_files as files

pytest.importorskip("peft")
FAMILIES = {
    "sd": tiny_models.stable_diffusion,
    "sdxl": tiny_models.stable_diffusion_xl,
    "sd3": tiny_models.stable_diffusion_3,
    "flux": tiny_models.flux,
}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


class Base:
    """A pipeline of each family on disk, and one training of it, whose network is as it was saved whenever it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trainings: dict[str, tuple[SavedTraining, dict[str, Tensor]]] = {}

    def place(self, family: str) -> Path:
        place = self.folder / family
        if not (place / "model_index.json").exists():
            FAMILIES[family](self.folder / f"tokenizer-{family}").save_pretrained(place)
        return place

    def training(self, family: str) -> SavedTraining:
        if family not in self.trainings:
            made = SavedTraining(self.place(family), resolution=16)
            self.trainings[family] = made, copy.deepcopy(made.denoiser.network.state_dict())
        training, state = self.trainings[family]
        if training._lora.loaded:
            training._pipeline.unload_lora_weights()
            training._lora.loaded = False
        training.denoiser.network.load_state_dict(state)
        return training


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tmp_path_factory.mktemp("bases"))


def moved(network: Any) -> Any:
    """The network, some way on in training."""
    found = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in found.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return found


def denoised(training: SavedTraining) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return training.denoiser(x, 0.4)


def checkpoint_at(path: Path, kind: Kind) -> CheckpointFiles:
    found = {entry.path: entry.checkpoint for entry in entries_of(path.parent)}[path]
    assert found is not None
    assert found.kind is kind
    return found


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_a_network_in_one_file_is_that_network(
    family: str, names: str, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (family, names) == ("flux", "original"):
        pytest.skip("diffusers converts Flux's own names for the width of Flux alone, 3072")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    training = base.training(family)
    before, network = denoised(training), moved(training.denoiser.network)
    own = {f"transformer.{name}": value for name, value in network.state_dict().items()}
    write = {"sd": files.original_unet, "sdxl": files.original_unet, "sd3": files.original_sd3}
    tensors = write[family](network) if names == "original" else own
    half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    path = tmp_path / "fox-step00000500.safetensors"
    save_file({name: value.contiguous() for name, value in half.items()}, path)
    training.load(checkpoint_at(path, Kind.FILE))
    found = denoised(training)
    training.denoiser.network.load_state_dict(network.state_dict())
    expected = denoised(training)
    assert (before - expected).abs().max() > 0.02
    torch.testing.assert_close(found, expected, atol=4e-3, rtol=0)  # of weights in half precision


LORAS = [
    ("sd", "kohya"), ("sd", "diffusers"), ("sd", "peft"), ("sd", "onetrainer backup"), ("sdxl", "kohya"), ("sdxl", "diffusers"),
    ("sd3", "diffusers"), ("sd3", "peft"), ("flux", "diffusers"), ("flux", "kohya"), ("flux", "onetrainer"), ("flux", "peft"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "format"), LORAS)
def test_a_lora_is_added_to_the_base(family: str, format: str, base: Base, tmp_path: Path) -> None:
    training = base.training(family)
    network, alpha = training.denoiser.network, 1.0
    lora = files.random_lora(network, ATTENTION)
    prefix = "unet" if family in ("sd", "sdxl") else "transformer"
    if format == "kohya" and family == "flux":
        lora = {name: pair for name, pair in lora.items() if name.endswith("attn.to_out.0") and "single" not in name}
        tensors = files.kohya_lora(
            {name.replace("transformer_blocks", "double_blocks").replace("attn.to_out.0", "img_attn_proj"): pair
             for name, pair in lora.items()}, alpha,
        )  # fmt: skip
    elif format in ("kohya", "onetrainer backup"):
        tensors = files.kohya_lora(lora, alpha)
    elif format == "onetrainer":
        tensors = files.kohya_lora(lora, alpha, "lora_transformer_")
    else:
        tensors, alpha = files.diffusers_lora(lora, prefix), float(len(next(iter(lora.values()))[0]))
    if format in ("kohya", "onetrainer"):  # the text encoders were trained as well
        tensors |= {
            f"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{way}.weight": torch.ones(2, 16) for way in ("down", "up")
        }
    path = tmp_path / "fox-000002.safetensors"
    if format == "peft":
        path, alpha = tmp_path / "checkpoint-20", 1.0
        files.peft_adapter(path, lora, alpha)
    elif format == "onetrainer backup":
        path = tmp_path / "2024-05-05_12-00-00-backup-20-1-0"
        (path / "lora").mkdir(parents=True)
        save_file(tensors, path / "lora" / "lora.safetensors")
    else:
        save_file(tensors, path)
    before = denoised(training)
    files.changed_by(network, lora, alpha / 2)
    expected = denoised(training)
    kind = Kind.PEFT if format == "peft" else Kind.LORA
    found = SavedTraining(base.place(family), resolution=16) if format == "peft" else base.training(family)
    found.load(checkpoint_at(path, kind))
    assert (before - expected).abs().max() > 1e-3
    torch.testing.assert_close(denoised(found), expected, atol=1e-5, rtol=1e-4)
    # Another one takes its place, and does not come on top of it.
    if format == "peft":
        files.peft_adapter(path, {name: (down, 0 * up) for name, (down, up) in lora.items()}, alpha)
    else:
        path = path / "lora" / "lora.safetensors" if path.is_dir() else path
        save_file({k: v * (0 if "lora_up" in k or "lora_B" in k else 1) for k, v in tensors.items()}, path)
    found.load(CheckpointFiles(path, path, kind, Position(3)))
    torch.testing.assert_close(denoised(found), before, atol=1e-5, rtol=1e-4)


def test_what_diffusers_would_leave_aside_is_refused(base: Base, tmp_path: Path) -> None:
    training = base.training("sd3")
    lora = files.random_lora(training.denoiser.network, ATTENTION)
    unknown = {f"joint_blocks.{i}.x": pair for i, pair in enumerate(lora.values())}
    nowhere = {"nowhere.to_q": (torch.ones(2, 16), torch.ones(16, 2))}
    cases = {
        "unknown layers": (files.kohya_lora(unknown, 1.0), "adapts"),
        "text alone": ({"lora_te1_x.lora_down.weight": torch.ones(2, 2), "lora_te1_x.alpha": torch.ones(())}, "no layer"),
        "a DoRA": (files.kohya_lora(lora, 1.0) | {"lora_unet_x.dora_scale": torch.ones(2)}, "is a DoRA"),
        "some layers": (files.diffusers_lora({**lora, **nowhere}, "transformer"), "layers"),
    }
    for name, (tensors, message) in cases.items():
        path = tmp_path / f"{name}-000001.safetensors"
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            base.training("sd3").load(CheckpointFiles(path, path, Kind.LORA, Position(1)))
    path = tmp_path / "vae-000001.safetensors"
    save_file({"decoder.conv_in.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="is not read as the weights of a SD3Transformer2DModel"):
        base.training("sd3").load(CheckpointFiles(path, path, Kind.FILE, Position(1)))

"""Encoders: what they do to images, whose weights they take, and what they refuse."""

from __future__ import annotations

import hashlib
import re
import sys
from ast import literal_eval
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mlflow_icr.extraction import encoder_networks
from mlflow_icr.extraction.encoder_networks import IMAGENET_MEAN, IMAGENET_STD, as_rgb
from mlflow_icr.extraction.encoder_weights import FIDELITY, WEIGHTS, Weights
from mlflow_icr.extraction.encoders import Encoder, load_encoder


class Means(nn.Module):
    """Mean and size of each channel: what reaches a network can be read from it."""

    def forward(self, x: Tensor) -> Tensor:
        size = torch.full([x.shape[0], 1], float(x.shape[3]))
        return torch.cat([x.mean([2, 3]), size], 1)


class FidLike(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert return_features
        return x.flatten(1)[:, :1].expand(x.shape[0], 2048)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "means.pt"
    torch.jit.script(Means()).save(str(path))
    return path


def test_pixels_are_the_images(digits: Tensor) -> None:
    encoder = load_encoder("pixels", shape=digits.shape[1:])
    assert torch.equal(encoder(digits), digits.float().flatten(1) / 255)
    assert encoder.dim == 64
    with pytest.raises(ValueError, match=r"needs that of an image, \(C, H, W\)"):
        load_encoder("pixels")


def test_channels_and_bits_follow_one_rule(script: Path) -> None:
    encoder = load_encoder(f"torchscript:{script}")
    rgb = torch.rand(5, 3, 20, 20)
    resized = interpolate(rgb, (224, 224), mode="bilinear", antialias=True)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    expected = (resized.mean((2, 3)) - mean) / std
    found = encoder(rgb)
    torch.testing.assert_close(found[:, :3], expected, rtol=1e-5, atol=1e-5)
    assert (found[:, 3] == 224).all()
    grey = torch.rand(5, 1, 20, 20)
    assert torch.equal(encoder(grey), encoder(grey.expand(-1, 3, -1, -1)))
    six = torch.rand(5, 6, 20, 20)
    torch.testing.assert_close(encoder(six), encoder(six.mean(1, keepdim=True)))
    assert as_rgb(six).shape == (5, 3, 20, 20)
    deep = (rgb.double() * 65535).round().to(torch.int32).to(torch.uint16)
    torch.testing.assert_close(encoder(deep), found, rtol=0, atol=1e-4)  # 16 bits are kept: 8 would be 4e-3 off
    small = Encoder("own", Means(), lambda x: x, dim=4, preprocessing="none", weights_sha256="", batch_size=2)
    torch.testing.assert_close(small(rgb)[:, :3], rgb.mean((2, 3)))


def test_the_batch_changes_nothing_and_the_identity_changes_with_everything(script: Path, digits: Tensor) -> None:
    whole, parts = (load_encoder(f"torchscript:{script}", batch_size=size) for size in (64, 7))
    torch.testing.assert_close(whole(digits), parts(digits))
    assert whole.identity == parts.identity
    assert whole.weights_sha256 == hashlib.sha256(script.read_bytes()).hexdigest()
    other = script.with_name("other.pt")
    torch.jit.script(nn.Sequential(Means())).save(str(other))
    assert load_encoder(f"torchscript:{other}").identity != whole.identity
    same = {"dim": 4, "weights_sha256": "a"}
    identities = {
        Encoder("x", Means(), lambda x: x, preprocessing="p", **same).identity,  # type: ignore[arg-type]
        Encoder("y", Means(), lambda x: x, preprocessing="p", **same).identity,  # type: ignore[arg-type]
        Encoder("x", Means(), lambda x: x, preprocessing="q", **same).identity,  # type: ignore[arg-type]
    }
    assert len(identities) == 3


def test_inception_gets_grey_values_and_the_right_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(FidLike()).save(str(path))
    with pytest.raises(ValueError, match=f"inception-2015-12-05.pt, SHA-256 {WEIGHTS['inception'].sha256}, or https"):
        load_encoder("inception", weights=path)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(WEIGHTS, "inception", Weights("https://example.org", right))
    encoder = load_encoder("inception", weights=path)
    found = encoder(torch.tensor([0.0, 0.4999, 1.0]).view(3, 1, 1, 1))
    assert found.shape == (3, 2048)
    assert found[:, 0].tolist() == [0, 127, 255]  # rounded, as a saved image would be


def fidelity_extractor() -> Any:
    if find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed: it wants torchvision, which not every build of torch has")
    return encoder_networks._fidelity_extractor()


def in_memory(state: dict[str, Tensor]) -> BytesIO:
    buffer = BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_the_checksums_are_those_that_file_names_hold() -> None:
    """torch.hub's convention: the name ends with the first eight digits of the SHA-256."""
    source = FIDELITY["inception"].source
    assert re.search(r"-([0-9a-f]{8})\.pth$", source)[1] == FIDELITY["inception"].sha256[:8]  # type: ignore[index]
    for weights in [*WEIGHTS.values(), *FIDELITY.values()]:
        assert re.fullmatch("|[0-9a-f]{64}", weights.sha256), weights


def test_inception_through_torch_fidelity_is_torch_fidelitys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Tensor
) -> None:
    before = {name for name in sys.modules if name.startswith(("torch_fidelity", "torchvision"))}
    extractor = fidelity_extractor()
    # Taken without the package's own imports, and nothing half imported is left.
    assert {name for name in sys.modules if name.startswith(("torch_fidelity", "torchvision"))} == before

    class Untrained(extractor):  # type: ignore[misc]
        def load_state_dict(self, state: dict[str, Tensor]) -> None:
            """Keeps the random weights."""

    torch.manual_seed(0)
    state = Untrained("untrained", ["2048"], feature_extractor_weights_path=in_memory({})).state_dict()
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(FIDELITY, "inception", Weights("https://example.org", checksum))
    encoder = load_encoder("inception", weights=path, batch_size=3)
    grey = digits[:5]
    theirs = extractor("theirs", ["2048"], feature_extractor_weights_path=in_memory(state))
    expected = theirs(grey.expand(-1, 3, -1, -1))[0]
    assert expected.std(0).max() > 0  # the images differ in it
    torch.testing.assert_close(encoder(grey), expected, rtol=1e-4, atol=1e-5)
    assert encoder.dim == 2048
    assert encoder.weights_sha256 == checksum


def test_nothing_untrusted_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "harmed",)

    path = tmp_path / "weights.pth"
    for content, message in (({"a": Harm()}, "are no file of tensors"), ([torch.ones(2)], "hold a list; expected tensors")):
        torch.save(content, path)
        monkeypatch.setitem(FIDELITY, "inception", Weights("here", hashlib.sha256(path.read_bytes()).hexdigest()))
        with pytest.raises(ValueError, match=message):
            load_encoder("inception", weights=path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_transformers_models_are_read_from_safetensors(name: str, tmp_path: Path, digits: Tensor) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14}
    if name == "dinov2":
        model: nn.Module = Dinov2Model(Dinov2Config(image_size=224, **sizes))
        side, dim = 224, 32
    else:
        config = CLIPVisionConfig(image_size=56, intermediate_size=64, projection_dim=24, **sizes)
        model, side, dim = CLIPVisionModelWithProjection(config), 56, 24
    model.eval().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    encoder = load_encoder(name, weights=tmp_path / "model")
    assert encoder.dim == dim
    found = encoder(digits[:3])
    x = interpolate(digits[:3].float() / 255, (side, side), mode="bicubic", antialias=True).clamp(0, 1).expand(-1, 3, -1, -1)
    mean, std = encoder.preprocessing.split("less ")[1].split(", over ")
    x = (x - torch.tensor(literal_eval(mean)).view(1, 3, 1, 1)) / torch.tensor(literal_eval(std)).view(1, 3, 1, 1)
    with torch.no_grad():
        output = model(pixel_values=x)
    expected = output.image_embeds if name == "clip" else output.last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model.bin")
    with pytest.raises(ValueError, match=r"hold no \*.safetensors"):
        load_encoder(name, weights=tmp_path / "model")


def test_efficientnet_comes_with_its_weights(digits: Tensor) -> None:
    encoder = load_encoder("efficientnet_lite0")
    assert encoder.weights_sha256 == WEIGHTS["efficientnet_lite0"].sha256
    found = encoder(digits[:6])
    assert found.shape == (6, 1280)
    shifted = torch.roll(digits[:6], 1, dims=3)
    cosines = torch.nn.functional.cosine_similarity(found[:, None], encoder(shifted)[None], dim=-1)
    assert (cosines.argmax(1) == torch.arange(6)).all()  # an image is nearest to itself, moved by a pixel


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet", None, "encoder is 'resnet'; expected one of pixels, inception, sscd"),
        ("inception", None, "get them from https://nvlabs-fi-cdn.nvidia.com"),
        (
            "sscd",
            "nowhere.pt",
            "encoder weights are 'nowhere.pt', which is no file; expected that of https://dl.fbaipublicfiles",
        ),
        ("dinov2", None, "such as a copy of https://huggingface.co/facebook/dinov2-base"),
        ("clip", "nowhere", "whose weights are 'nowhere'; run `mlflow-icr encoders fetch clip`"),
        ("torchscript:nowhere.pt", None, "'nowhere.pt' is no file"),
    ],
)
def test_what_is_missing_is_said_with_where_to_get_it(name: str, weights: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_encoder(name, weights=weights)


def test_files_and_networks_that_are_something_else_are_refused(tmp_path: Path, digits: Tensor) -> None:
    path = tmp_path / "pickle.pt"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="no TorchScript file"):
        load_encoder(f"torchscript:{path}")
    torch.jit.script(nn.Identity()).save(str(tmp_path / "identity.pt"))
    with pytest.raises(ValueError, match=re.escape("gives (1, 3, 224, 224) for one image; expected (1, dim)")):
        load_encoder(f"torchscript:{tmp_path / 'identity.pt'}")
    broken = Encoder("broken", lambda x: x.flatten(1) / 0, lambda x: x, dim=64, preprocessing="", weights_sha256="")
    with pytest.raises(ValueError, match="encoder 'broken' gives NaN or Inf"):
        broken(digits)
    narrow = Encoder("narrow", lambda x: x.flatten(1), lambda x: x, dim=3, preprocessing="", weights_sha256="")
    with pytest.raises(ValueError, match=re.escape("gives (64, 64) for 64 images; expected (N, 3)")):
        narrow(digits)

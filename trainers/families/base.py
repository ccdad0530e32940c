"""The interface of a family to the loop, the monitors and the checkpoints."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlflow_icr import Denoiser
from mlflow_icr.extraction.images import Size, height_width
from mlflow_icr.extraction.pipelines import NULL_CLASS
from trainers.augment_labels import add_label_layer, without_label_layer
from trainers.augmentation import EDM
from trainers.config import TrainConfig
from trainers.families.dit import share_embedding, with_own_embeddings
from trainers.families.pipeline import NoiseToImagePipeline
from trainers.lora import add_lora, save_lora, without_lora
from trainers.options import TRANSFORMER
from trainers.warm_start import check_start, find_start, load_start

PIPELINE = Path(__file__).with_name("pipeline.py")
VAE = "vae"


class Family(ABC):
    """A kind of diffusion model: its network, noise levels, loss, sampler, and the folder it is saved as.

    `x` is what the network works on, (B, C, H, W): images in [-1, 1] or latents. A noise level is of the family's own kind
    (sigma, a timestep, a time), one for each image. A model of K = `num_classes` classes has a null class, number K.
    """

    def __init__(self, config: TrainConfig, num_classes: int | None = None) -> None:
        self.config, self.num_classes = config, num_classes
        self._null_of_start: int | None = None

    @property
    def null_class(self) -> int | None:
        """The class that stands for none; None for a U-Net without classes. A transformer without classes has class 0 alone."""
        null = self._null_of_start if self.num_classes is None else self.num_classes
        return null or 0 if self.config.network.kind == TRANSFORMER else null

    def build(self, channels: int, size: Size, start: str = "") -> nn.Module:
        """The network for x (B, channels, side, side), or (B, channels, height, width), initialised from the seed.

        A trained network is taken from `start`, else from the configuration's `init_from`. Raises ValueError if there is none,
        or it does not fit.
        """
        place, rank = start or self.config.network.init_from, self.config.network.lora_rank
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.run.seed)
            network = (
                self._trained(place, channels, height_width(size)) if place else self._network(channels, height_width(size))
            )
            if rank:
                add_lora(network, rank)
            if self.config.data.augment == EDM:
                add_label_layer(network)
            return network

    def _trained(self, place: str, channels: int, size: tuple[int, int]) -> nn.Module:
        start = find_start(place)
        check_start(start, channels, size, self.num_classes)
        network = load_start(start, channels, self.num_classes, self.config.network.dropout)
        if start.is_transformer:
            share_embedding(network, trained=True)
        self._null_of_start = start.null_class
        return network

    @abstractmethod
    def _network(self, channels: int, size: tuple[int, int]) -> nn.Module:
        """The network, from torch's global generator."""

    @abstractmethod
    def denoiser(self, network: nn.Module) -> Denoiser:
        """D(x, sigma) of a network, which the monitors read; called with `labels=` for classes, else of the null class."""

    @abstractmethod
    def draw(self, generator: np.random.Generator, count: int) -> Tensor:
        """Noise levels of a training batch, (count,) float32."""

    @abstractmethod
    def loss(self, denoiser: Any, x: Tensor, level: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean loss of this family's `denoiser` on clean x at noise levels (B,), with unit noise and classes (B,)."""

    @abstractmethod
    def scheduler(self) -> Any:
        """diffusers' scheduler of the noise that is trained on."""

    def components(self, network: Any) -> dict[str, Any]:
        """The network as it is saved, by its folder's name; each block of a transformer has a copy of the embedding."""
        if self.config.network.kind == TRANSFORMER:
            return {"transformer": with_own_embeddings(network)}
        return {"unet": network}

    def stock_pipeline(self, network: Any) -> Any:
        """A pipeline of diffusers that samples images of the network; None where there is none."""
        return None

    def save(self, folder: Path, network: nn.Module, *, latent: bool = False) -> None:
        """Write a folder that plain diffusers loads and samples; for a `latent` model, all but the autoencoder's `vae/`.

        Where no pipeline of diffusers does it (latents, flow matching), `pipeline.py` is in the folder, and loading it needs
        trust_remote_code=True. Weights are safetensors. A LoRA is merged into the network's weights, and also saved beside
        them, as diffusers' loaders take it. A layer for augmentation's labels is left out: samples have none.
        """
        network = without_label_layer(network)
        if self.config.network.lora_rank:
            save_lora(folder, next(iter(self.components(network))), network)
            network = without_lora(network)
        pipeline = None if latent else self.stock_pipeline(network)
        if pipeline is None:
            pipeline = NoiseToImagePipeline(self.scheduler(), **self.components(network))
        pipeline.save_pretrained(folder)
        path = folder / "model_index.json"
        index = json.loads(path.read_text())
        if isinstance(pipeline, NoiseToImagePipeline):
            shutil.copy(PIPELINE, folder)
            index["_class_name"] = [PIPELINE.stem, NoiseToImagePipeline.__name__]
        if latent:
            index[VAE] = ["diffusers", "AutoencoderKL"]
        if self.null_class is not None:
            index[NULL_CLASS] = self.null_class  # keys of this form are left alone by diffusers
        path.write_text(json.dumps(index, indent=2) + "\n")

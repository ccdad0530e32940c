"""Fine-tuning a text-to-image U-Net by LoRA (experimental): a watch for the loop of diffusers' training script.

Experimental: it has not been measured how often the verdict is right here. Its thresholds come from training from scratch on
hundreds of images; a LoRA starts from a trained model and has few images.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mlflow_icr.extraction.adapters import TextCondition, adapt
from mlflow_icr.extraction.adapters.text import check_text_unet, embed_prompt
from mlflow_icr.extraction.denoisers import Denoiser
from mlflow_icr.integrations.watch import ICRWatch
from mlflow_icr.integrations.weights import bare
from mlflow_icr.monitoring import Protocol
from mlflow_icr.monitoring.reader import FeatureReader

logger = logging.getLogger(__name__)

EXPERIMENTAL = "LoRA fine-tuning: the verdict's thresholds were found on training from scratch"
# Few images need many views each: in total about as many as for a training from scratch on 160 images.
VIEWS = 640
# For layers of a thousand or more channels, at most so many directions are read, and no more than the images span.
DIRECTIONS = 64


def few_images_protocol(num_images: int, dim: int, *, layer: str = "decoder", sigma: float = 0.29, seed: int = 0) -> Protocol:
    """The protocol for few images and a layer of width `dim`: many views of each, along the directions that the images span.

    With N images and K views there are (N-1)(K-1) residual degrees of freedom, of which the debiased ICR needs more than
    directions. Raises ValueError for fewer than 2 images.
    """
    if num_images < 2:
        raise ValueError(f"num_images is {num_images}; expected at least 2")
    views = min(64, max(8, math.ceil(VIEWS / num_images)))
    directions = min(num_images - 1, DIRECTIONS, dim)
    return Protocol(layer, (sigma,), num_images=num_images, num_views=views, seed=seed, projection=directions)


def lora_watch(
    unet: nn.Module,
    scheduler: Any,
    autoencoder: nn.Module,
    text_encoder: nn.Module,
    tokenizer: Any,
    images: Tensor,
    output_dir: Path | str,
    *,
    prompt: str = "",
    layer: str = "decoder",
    protocol: Protocol | None = None,
    batch_size: int = 16,
    pictures: bool = False,
    tags: Mapping[str, str] | None = None,
    **options: Any,
) -> ICRWatch:
    """A watch on a UNet2DConditionModel in which a LoRA is trained (experimental), from the parts that the script has.

    `unet` may be the one that Accelerate prepared. It is read with `prompt`, which is empty unless given, embedded once by
    `text_encoder` (CLIP's) and `tokenizer`. `images` are the training images (N, 3, H, W), uint8, at the training resolution;
    `scheduler` is the one that the script adds noise with. `protocol` None is `few_images_protocol`; `options` are those of
    ICRWatch. Call the watch with images seen after each step. Raises ValueError for parts that do not fit together.
    """
    network = bare(unet, "unet")
    denoiser = _denoiser(network, scheduler, autoencoder, TextCondition(embed_prompt(text_encoder, tokenizer, prompt)))
    if protocol is None:
        # This reader reads nothing; it only determines the layer's width.
        dim = FeatureReader(denoiser, images[:2], Protocol(layer=layer), batch_size, 0).dim
        protocol = few_images_protocol(len(images), dim, layer=layer)
    logger.warning("experimental: %s", EXPERIMENTAL)
    return ICRWatch(
        denoiser,
        images,
        output_dir,
        protocol=protocol,
        pictures=pictures,
        batch_size=batch_size,
        tags={"icr.experimental": EXPERIMENTAL, **(tags or {})},
        **options,
    )


def _denoiser(network: nn.Module, scheduler: Any, autoencoder: nn.Module, condition: TextCondition) -> Denoiser:
    if type(network).__name__ != "UNet2DConditionModel":
        raise ValueError(f"unet is a {type(network).__name__}; expected a UNet2DConditionModel")
    check_text_unet(network)
    config: Any = network.config
    latents: Any = autoencoder.config
    if config.addition_embed_type is not None:
        raise ValueError("unet is Stable Diffusion XL's; expected adapt_pipeline on a pipeline of the script's parts")
    if config.in_channels != latents.latent_channels:
        raise ValueError(f"unet takes {config.in_channels} channels, and the autoencoder makes {latents.latent_channels}")
    return adapt(network, scheduler, call=condition, autoencoder=autoencoder)

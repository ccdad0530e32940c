"""Text, by cross-attention: UNet2DConditionModel of Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def spread(condition: Tensor, x: Tensor) -> Tensor:
    """One condition (1, ...) for each of the images x (B, ...), (B, ...) of its dtype and device."""
    return condition.to(x.device, x.dtype).expand(len(x), *condition.shape[1:])


class TextCondition:
    """Runs a network with one prompt for all images: its embeddings (1, T, D).

    Stable Diffusion XL also needs the prompt's pooled embedding (1, P), and `time_ids` (1, 6): original size, crop and target
    size in pixels.
    """

    def __init__(self, embeddings: Tensor, pooled: Tensor | None = None, time_ids: Tensor | None = None) -> None:
        self.embeddings, self.pooled, self.time_ids = embeddings, pooled, time_ids

    def __call__(self, network: nn.Module, x: Tensor, time: Tensor) -> Any:
        """The network's output on x (B, C, H, W) at times (B,)."""
        added = None
        if self.pooled is not None and self.time_ids is not None:
            added = {"text_embeds": spread(self.pooled, x), "time_ids": spread(self.time_ids, x)}
        return network(x, time, encoder_hidden_states=spread(self.embeddings, x), added_cond_kwargs=added)


@torch.no_grad()
def embed_prompt(text_encoder: nn.Module, tokenizer: Any, prompt: str = "") -> Tensor:
    """A prompt's embeddings (1, T, D) by a CLIP text encoder, as the text-to-image training scripts of diffusers make them."""
    tokens = tokenizer(
        prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    device = next(text_encoder.parameters()).device
    return text_encoder(tokens.input_ids.to(device))[0]


def check_text_unet(network: nn.Module) -> None:
    """Raise ValueError for a UNet2DConditionModel with conditions that are neither a prompt nor Stable Diffusion XL's."""
    c: Any = network.config
    kinds = {"addition_embed_type": (None, "text_time"), "class_embed_type": (None,), "encoder_hid_dim_type": (None,)}
    for field, allowed in kinds.items():
        if getattr(c, field, None) not in allowed:
            raise ValueError(f"the network's {field} is {getattr(c, field)!r}; expected {' or '.join(map(repr, allowed))}")
    if getattr(c, "num_class_embeds", None):
        raise ValueError(f"the network's num_class_embeds is {c.num_class_embeds}; expected a network without classes")


@torch.no_grad()
def null_text(pipeline: Any, side: int, prompt: str = "") -> TextCondition:
    """The condition of a Stable Diffusion pipeline for a prompt, or the unconditional one, for images of `side` pixels.

    The unconditional one is the pipeline's own: the empty prompt, or zeros for an XL that was trained so.
    """
    check_text_unet(pipeline.unet)
    xl = pipeline.unet.config.addition_embed_type == "text_time"
    encodings = pipeline.encode_prompt(
        prompt, device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    which = 0 if prompt else 1
    if not xl:
        return TextCondition(encodings[which])
    embeddings, pooled = encodings[which], encodings[which + 2]
    time_ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
    unet = pipeline.unet
    width = unet.config.addition_time_embed_dim * time_ids.shape[1] + pooled.shape[1]
    if width != unet.add_embedding.linear_1.in_features:
        raise ValueError(
            f"the network takes {unet.add_embedding.linear_1.in_features} numbers of pooled text and sizes, not {width}; "
            "expected the base network of Stable Diffusion XL, not its refiner"
        )
    return TextCondition(embeddings, pooled, time_ids)

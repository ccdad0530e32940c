"""Text, by joint attention on packed latents: FluxTransformer2DModel of Flux.1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from mlflow_icr.extraction.adapters.text import spread

# The guidance of a guidance-distilled network: 1 is the conditional prediction itself, without guidance.
GUIDANCE = 1.0


class FluxCondition:
    """Runs the transformer with one prompt for all images: its embeddings (1, T, D) and its pooled embedding (1, P).

    Latents are packed: a token is a square of 2 x 2 of them. A guidance-distilled network also gets `guidance`.
    """

    def __init__(self, embeddings: Tensor, pooled: Tensor, guidance: float = GUIDANCE) -> None:
        self.embeddings, self.pooled, self.guidance = embeddings, pooled, guidance

    def __call__(self, network: nn.Module, x: Tensor, time: Tensor) -> Tensor:
        """The network's output, (B, C, H, W), on x of that shape at times (B,) in [0, 1000]; H and W are even."""
        config: Any = network.config
        height, width = x.shape[-2] // 2, x.shape[-1] // 2
        packed = pixel_unshuffle(x, 2).flatten(2).mT  # (B, H W / 4, 4 C)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(x)
        guidance = torch.full((len(x),), self.guidance).to(x) if config.guidance_embeds else None
        output = network(
            hidden_states=packed,
            timestep=(time / 1000).to(x.dtype),  # which the network multiplies by 1000
            guidance=guidance,
            pooled_projections=spread(self.pooled, x),
            encoder_hidden_states=spread(self.embeddings, x),
            txt_ids=torch.zeros(self.embeddings.shape[1], 3).to(x),
            img_ids=places,
        )
        return pixel_shuffle(output.sample.mT.unflatten(2, (height, width)), 2)


@torch.no_grad()
def null_flux(pipeline: Any, prompt: str = "") -> FluxCondition:
    """The condition of a Flux pipeline for a prompt, which by default is empty."""
    embeddings, pooled, _ = pipeline.encode_prompt(prompt, None, device=pipeline.device)
    return FluxCondition(embeddings, pooled)

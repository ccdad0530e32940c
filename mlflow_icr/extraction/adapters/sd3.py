"""Text, by joint attention: SD3Transformer2DModel of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlflow_icr.extraction.adapters.text import spread


class SD3Condition:
    """Runs the transformer with one prompt for all images: its embeddings (1, T, D) and its pooled embedding (1, P)."""

    def __init__(self, embeddings: Tensor, pooled: Tensor) -> None:
        self.embeddings, self.pooled = embeddings, pooled

    def __call__(self, network: nn.Module, x: Tensor, time: Tensor) -> Any:
        """The network's output on x (B, C, H, W) at times (B,) in [0, 1000]."""
        return network(
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=spread(self.embeddings, x),
            pooled_projections=spread(self.pooled, x),
        )


@torch.no_grad()
def null_sd3(pipeline: Any, prompt: str = "") -> SD3Condition:
    """The condition of a Stable Diffusion 3 pipeline for a prompt, or the unconditional one without a prompt."""
    encodings = pipeline.encode_prompt(prompt, None, None, device=pipeline.device, do_classifier_free_guidance=True)
    which = 0 if prompt else 1
    return SD3Condition(encodings[which], encodings[which + 2])

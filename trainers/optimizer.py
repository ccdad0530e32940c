"""Updates of the weights: learning rate along a training, Adam or AdamW, clipped gradients and skipped steps, the average."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainers.engine import gathered, local
from trainers.groups import OptimizerConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def learning_rate_at(config: OptimizerConfig, images_seen: int) -> float:
    """The learning rate of the step that begins at images_seen: a linear ramp, then constant or one of two decays.

    Source of inverse_sqrt: Karras et al. 2024, equation 67 (EDM2's), with lr_decay_kimg as t_ref.
    """
    ramp = config.rampup_kimg * 1000
    rate = config.learning_rate * min(1.0, (images_seen + config.batch_size) / max(ramp, 1e-8))
    match config.lr_decay:
        case "cosine":
            share = (images_seen - ramp) / max(config.total_kimg * 1000 - ramp, 1e-8)
            return rate * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, share))))
        case "inverse_sqrt":
            return rate / math.sqrt(max(1.0, images_seen / (config.lr_decay_kimg * 1000)))
        case _:
            return rate


def ema_beta(config: OptimizerConfig, images_seen: int) -> float:
    """The share of the old average that one batch keeps: EDM's half-life, at most ema_rampup_ratio of the images seen."""
    halflife = config.ema_halflife_kimg * 1000
    if (ratio := config.ema_rampup_ratio) is not None:
        halflife = min(halflife, images_seen * ratio)
    return float(0.5 ** (config.batch_size / max(halflife, 1e-8)))


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """Adam, or AdamW where weights decay; one kernel for all parameters, where the device has one."""
    first, second = config.betas
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (first, second),
        "fused": device.type in ("cpu", "cuda", "mps"),
    }
    if config.weight_decay:
        return torch.optim.AdamW(parameters, weight_decay=config.weight_decay, **options)
    return torch.optim.Adam(parameters, **options)


def guard_gradients(
    parameters: Iterable[nn.Parameter], optimizer: Any, skipped: Tensor, accelerator: Accelerator, clip_norm: float
) -> Tensor:
    """Clip the gradients; if one is not finite, skip the coming step and count it. Returns the norm before, 0 if not finite.

    The norm is that of all ranks' gradients, so all ranks skip the same steps, and the device decides by itself. Fused Adam
    takes `found_inf` as it does from torch's gradient scaler. In fp16 that scaler skips the step, and it is only counted here.
    `skipped` (2,) counts skipped steps, in all and in a row.
    """
    if accelerator.scaler is not None:
        accelerator.unscale_gradients()
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = gathered(torch.nn.utils.get_total_norm(gradients))
    finite = norm.isfinite()
    if clip_norm:
        torch._foreach_mul_([local(g) for g in gradients], (clip_norm / (norm + 1e-6)).clamp(max=1.0))
    if accelerator.scaler is None:
        getattr(optimizer, "optimizer", optimizer).found_inf = finite.logical_not().float()
    bad = finite.logical_not().long()
    skipped += bad
    skipped[1] *= bad  # in a row, which a good step ends
    return torch.where(finite, norm, 0.0)

"""A LoRA on a trained network: low-rank changes of its attention's layers, trained while all else is frozen.

Source: Hu et al. 2022; the layers are those of diffusers' own training scripts.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name


def add_lora(network: nn.Module, rank: int) -> None:
    """Give the attention layers of a network a LoRA each, which changes nothing yet, and freeze all else.

    Raises ValueError for a network without attention, a rank above its width, or without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError(f"lora_rank is {rank}, which needs peft: pip install 'mlflow-icr[lora]'") from None
    layers = [module for name, module in network.named_modules() if name.endswith(LAYERS)]
    if not layers:
        raise ValueError(f"lora_rank is {rank}, but the network of init_from has no attention; expected 0")
    width = min(min(module.weight.shape[:2]) for module in layers)
    if rank > width:
        raise ValueError(f"lora_rank is {rank}; expected at most {width}, the width of its narrowest attention")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS)), network)


def without_lora(network: nn.Module) -> nn.Module:
    """A copy of a network in which the LoRA is part of the weights."""
    from peft.tuners.lora import LoraLayer

    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module.get_base_layer())
    return network


def save_lora(folder: Path, part: str, network: nn.Module) -> None:
    """Write a network's LoRA as diffusers' loaders take it; `part` is the network's name in a pipeline."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Any] = get_peft_model_state_dict(network)
    tensors = {f"{part}.{key}": value.detach().cpu().contiguous() for key, value in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

"""The files that other people's trainers write, by their names and formats; written here from the layouts alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

LAYERS = 1  # of a block of the tiny U-Nets
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
EMBEDDINGS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_unet_name(name: str) -> str:
    """A tensor of a UNet2DConditionModel by its name in Stable Diffusion's own files."""
    for ours, theirs in EMBEDDINGS.items():
        if name.startswith(f"{ours}."):
            return f"{theirs}.{name.removeprefix(f'{ours}.')}"
    place, _, rest = name.partition(".")
    if place == "mid_block":
        kind, number, inner = rest.split(".", 2)
        index = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{index}.{_inside(kind, inner)}"
    block, kind, number, inner = rest.split(".", 3)
    if place == "down_blocks":
        index = 1 + int(block) * (LAYERS + 1) + (LAYERS if kind == "downsamplers" else int(number))
        if kind == "downsamplers":
            return f"input_blocks.{index}.0.op.{inner.removeprefix('conv.')}"
        return f"input_blocks.{index}.{int(kind == 'attentions')}.{_inside(kind, inner)}"
    index = int(block) * (LAYERS + 1) + (LAYERS if kind == "upsamplers" else int(number))
    if kind == "upsamplers":
        return f"output_blocks.{index}.2.{inner}"  # after the resnet and the attention, which the first up block has
    return f"output_blocks.{index}.{int(kind == 'attentions')}.{_inside(kind, inner)}"


def _inside(kind: str, inner: str) -> str:
    part, _, rest = inner.partition(".")
    return f"{RESNET[part]}.{rest}" if kind == "resnets" else inner


def original_unet(unet: nn.Module) -> dict[str, Tensor]:
    """A whole file of Stable Diffusion, as sd-scripts and OneTrainer save it: the U-Net, and something of its other parts."""
    found = {f"model.diffusion_model.{original_unet_name(name)}": value for name, value in unet.state_dict().items()}
    return {**found, "first_stage_model.decoder.conv_in.weight": torch.ones(2), "cond_stage_model.x": torch.ones(2)}


def original_sd3(transformer: nn.Module) -> dict[str, Tensor]:
    """Stable Diffusion 3's transformer by the names of its own files."""
    ours, theirs = transformer.state_dict(), {}

    def swapped(weight: Tensor) -> Tensor:
        return torch.cat(weight.chunk(2)[::-1])

    def take(name: str, other: str, swap: bool = False) -> None:
        for kind in ("weight", "bias"):
            value = ours[f"{name}.{kind}"]
            theirs[f"{other}.{kind}"] = swapped(value) if swap else value

    theirs["pos_embed"] = ours["pos_embed.pos_embed"]
    take("pos_embed.proj", "x_embedder.proj")
    take("context_embedder", "context_embedder")
    for place, mine in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        take(f"time_text_embed.{mine}.linear_1", f"{place}.mlp.0")
        take(f"time_text_embed.{mine}.linear_2", f"{place}.mlp.2")
    take("norm_out.linear", "final_layer.adaLN_modulation.1", swap=True)
    take("proj_out", "final_layer.linear")
    count = 1 + max(int(name.split(".")[1]) for name in ours if name.startswith("transformer_blocks."))
    for i in range(count):
        block, joint, last = f"transformer_blocks.{i}", f"joint_blocks.{i}", i == count - 1
        for stream, names in (("x_block", "to_{}"), ("context_block", "add_{}_proj")):
            for kind in ("weight", "bias"):
                parts = [ours[f"{block}.attn.{names.format(part)}.{kind}"] for part in "qkv"]
                theirs[f"{joint}.{stream}.attn.qkv.{kind}"] = torch.cat(parts)
        take(f"{block}.attn.to_out.0", f"{joint}.x_block.attn.proj")
        take(f"{block}.norm1.linear", f"{joint}.x_block.adaLN_modulation.1")
        take(f"{block}.norm1_context.linear", f"{joint}.context_block.adaLN_modulation.1", swap=last)
        take(f"{block}.ff.net.0.proj", f"{joint}.x_block.mlp.fc1")
        take(f"{block}.ff.net.2", f"{joint}.x_block.mlp.fc2")
        if not last:
            take(f"{block}.attn.to_add_out", f"{joint}.context_block.attn.proj")
            take(f"{block}.ff_context.net.0.proj", f"{joint}.context_block.mlp.fc1")
            take(f"{block}.ff_context.net.2", f"{joint}.context_block.mlp.fc2")
    return {f"model.diffusion_model.{name}": value.contiguous() for name, value in theirs.items()}


def random_lora(network: nn.Module, names: list[str], rank: int = 2, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Low-rank changes (down, up) of a network's linear layers, by their names."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and any(name.endswith(ending) for ending in names):
            down = torch.randn(rank, module.in_features, generator=generator)
            found[name] = down, 0.1 * torch.randn(module.out_features, rank, generator=generator)
    return found


def changed_by(network: nn.Module, lora: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> None:
    """Add a LoRA to a network's own weights."""
    with torch.no_grad():
        for name, (down, up) in lora.items():
            network.get_submodule(name).weight += scale * up @ down  # type: ignore[operator]


def kohya_lora(lora: Mapping[str, tuple[Tensor, Tensor]], alpha: float, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    """A LoRA in the format of sd-scripts, of OneTrainer and, of Stable Diffusion, ai-toolkit."""
    found = {}
    for name, (down, up) in lora.items():
        plain = prefix + name.replace(".", "_")
        found[f"{plain}.lora_down.weight"], found[f"{plain}.lora_up.weight"] = down, up
        found[f"{plain}.alpha"] = torch.tensor(alpha)
    return found


def diffusers_lora(lora: Mapping[str, tuple[Tensor, Tensor]], prefix: str) -> dict[str, Tensor]:
    """A LoRA in diffusers' format, which ai-toolkit uses for Flux: `prefix` is the part of the pipeline."""
    found = {}
    for name, (down, up) in lora.items():
        found[f"{prefix}.{name}.lora_A.weight"], found[f"{prefix}.{name}.lora_B.weight"] = down, up
    return found


def peft_adapter(folder: Path, lora: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> None:
    """A folder of PEFT's `save_pretrained`, whose config comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(diffusers_lora(lora, "base_model.model"), folder / "adapter_model.safetensors")
    rank = len(next(iter(lora.values()))[0])
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(lora), "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def kohya_metadata(steps: int, epoch: int, batch: int = 4) -> dict[str, str]:
    """What sd-scripts writes beside a LoRA, of it the part that says where it was."""
    return {
        "ss_steps": str(steps),
        "ss_epoch": str(epoch),
        "ss_total_batch_size": str(batch),
        "ss_network_module": "networks.lora",
        "ss_output_name": "fox",
    }


def toolkit_metadata(step: int) -> dict[str, str]:
    """What ai-toolkit writes beside weights."""
    return {"format": "pt", "name": "fox", "training_info": json.dumps({"step": step, "epoch": 3})}


def half_written(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Begin a file, as a trainer does that is in the middle of saving; returns what is missing."""
    content = save(tensors, metadata)
    path.write_bytes(content[: len(content) // 2])
    return content[len(content) // 2 :]


def output_of(network: Any, condition: Any, x: Tensor) -> Tensor:
    """What a network says, by the condition that its denoiser runs it with."""
    with torch.no_grad():
        out = condition(network, x, torch.full((len(x),), 400.0))
    found: Tensor = out.sample if hasattr(out, "sample") else out
    return found

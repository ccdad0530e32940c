"""Tiny, randomly initialised pipelines of diffusers' own classes, for images of 16x16 pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

LENGTH = 8  # tokens of a prompt


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with a vocabulary of two letters, made from files as every version reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def clip(with_projection: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=6, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2,
        max_position_embeddings=LENGTH, projection_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel)(config).eval()


def autoencoder() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=2, layers_per_block=1, sample_size=16, scaling_factor=0.7, shift_factor=0.1,
    ).eval()  # fmt: skip


def text_unet(**changes: Any) -> Any:
    arguments = dict(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8,
    )  # fmt: skip
    return diffusers.UNet2DConditionModel(**(arguments | changes))


def stable_diffusion(folder: Path, scheduler: Any = None) -> Any:
    torch.manual_seed(0)
    return diffusers.StableDiffusionPipeline(
        autoencoder(), clip(), clip_tokenizer(folder), text_unet(), scheduler or diffusers.DDIMScheduler(clip_sample=False),
        None, None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(folder: Path) -> Any:
    torch.manual_seed(1)
    unet = text_unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_spacing="leading")
    tokenizer = clip_tokenizer(folder)
    return diffusers.StableDiffusionXLPipeline(
        autoencoder(), clip(), clip(True), tokenizer, tokenizer, unet, scheduler, add_watermarker=False,
        force_zeros_for_empty_prompt=False,
    )  # fmt: skip


def stable_diffusion_3(folder: Path) -> Any:
    torch.manual_seed(2)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=8,
    )  # fmt: skip
    tokenizer = clip_tokenizer(folder)
    return diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(), clip(True), tokenizer, clip(True),
        tokenizer, None, None,
    )  # fmt: skip


def flux(folder: Path) -> Any:
    torch.manual_seed(3)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=128)
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(), clip(), clip_tokenizer(folder),
        transformers.T5EncoderModel(config).eval(), transformers.T5TokenizerFast(), transformer,
    )  # fmt: skip


def dit(folder: Path) -> Any:
    torch.manual_seed(4)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8, patch_size=2,
        num_embeds_ada_norm=5, norm_num_groups=1,
    )  # fmt: skip
    return diffusers.DiTPipeline(transformer, autoencoder(), diffusers.DDIMScheduler(clip_sample=False))

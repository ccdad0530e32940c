"""A training script in plain diffusers and peft, as other projects have it. It imports nothing of this library.

    python tune.py FOLDER OUT --images-seen N [--base PIPELINE [--lora]]

Trains a small U-Net on the images in a folder, from scratch or from a pipeline, and saves three checkpoints in each doubling of
the images seen: `checkpoint-<images seen>/unet` with averaged weights, or a folder of PEFT with `--lora`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image

SIDE, BATCH = 8, 64
LORA_LAYERS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "to_q", "to_k", "to_v", "to_out.0"]


def load_images(folder: str) -> torch.Tensor:
    """All images in a folder, (N, 3, H, W) uint8."""
    paths = sorted(Path(folder).rglob("*.png"))
    return torch.stack([torch.from_numpy(np.asarray(Image.open(path)).copy()) for path in paths]).permute(0, 3, 1, 2)


def new_unet() -> UNet2DModel:
    """A small U-Net of pixels."""
    return UNet2DModel(
        sample_size=SIDE, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
    )  # fmt: skip


def milestones(first: int, last: int) -> list[int]:
    """Images seen at which to save: three in each doubling from the first to the last."""
    points, place = set[int](), float(first)
    while place < last:
        points.add(round(place / BATCH) * BATCH)
        place *= 2 ** (1 / 3)
    return sorted({*points, last})


def main() -> None:
    """Train, and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--images-seen", type=int, required=True)
    parser.add_argument("--base")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    images = load_images(args.folder)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample_range=1.0)
    unet = new_unet() if args.base is None else UNet2DModel.from_pretrained(args.base, subfolder="unet")
    model: torch.nn.Module = unet
    if args.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(unet, LoraConfig(r=16, lora_alpha=16, target_modules=LORA_LAYERS))
    trainable = [p for p in model.parameters() if p.requires_grad]
    rate = 1e-3 if args.lora else 5e-4 if args.base is None else 3e-4
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    ema = None if args.lora else EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    saves = set(milestones(args.images_seen if args.base is None else 1024, args.images_seen // BATCH * BATCH))

    model.train()
    for seen in range(BATCH, max(saves) + 1, BATCH):
        clean = images[torch.randint(len(images), (BATCH,))].float() / 127.5 - 1
        clean = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, clean.flip(3), clean) if args.base is None else clean
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (BATCH,))
        warm = min(1.0, seen / (200 * BATCH))
        for group in optimizer.param_groups:
            group["lr"] = rate * warm
        loss = torch.nn.functional.mse_loss(model(scheduler.add_noise(clean, noise, t), t).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(unet.parameters())
        if seen in saves:
            where = args.out / f"checkpoint-{seen}"
            if ema is None:
                model.save_pretrained(where)  # type: ignore[operator]
                continue
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
            if args.base is None:
                DDPMPipeline(unet, scheduler).save_pretrained(args.out)
            else:
                unet.save_pretrained(where / "unet")
            ema.restore(unet.parameters())


if __name__ == "__main__":
    main()

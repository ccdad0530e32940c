"""Defaults of a training: resolution, batch, network, length and measurements, from the data and the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlflow_icr.extraction.images import height_width, parse_size
from trainers.data import DataFacts, facts_of, images_in_other_groups
from trainers.options import TRANSFORMER, UNET, network_of

STEP = 4  # sides are multiples of it, so that a U-Net halves them twice at least
MOST_HELDOUT = 5000
# Pixels of a batch that a device's memory and time allow: 64 images of 64x64 on a GPU, 64 of 16x16 on a CPU.
BATCH_PIXELS = {"cuda": 64 * 64 * 64, "mps": 32 * 64 * 64, "cpu": 64 * 16 * 16}
LARGEST_SIDE = {"cuda": 256, "mps": 64, "cpu": 32}
LARGEST_BATCH = {"cuda": 256, "mps": 128, "cpu": 64}
# Channels of the U-Net's levels, from the images' side down: narrow enough to train on a CPU in minutes, and on a GPU those of
# EDM's network for CIFAR-10 (Karras et al. 2022, table 7), wider below.
CPU_CHANNELS, GPU_CHANNELS = (32, 64, 64, 64), (128, 256, 256, 256, 512, 512)
ATTENTION_SIDES = (16, 8)
LEAST_KIMG, MOST_KIMG = 100, 200_000
EPOCHS = 1000


@dataclass(frozen=True)
class Device:
    """What a training runs on: cuda, mps or cpu, and whether it computes in bfloat16."""

    kind: str
    bf16: bool = False


def device_here() -> Device:
    """The device of this machine."""
    import torch

    if torch.cuda.is_available():
        return Device("cuda", torch.cuda.is_bf16_supported())
    return Device("mps" if torch.backends.mps.is_available() else "cpu")


def _power_of_two(value: float, least: int, most: int) -> int:
    """The largest power of two that is at most `value`, within bounds that are powers of two."""
    return max(least, min(most, 2 ** int(math.log2(max(1, value)))))


def _levels(height: int, width: int) -> int:
    """Levels of a U-Net: sides are halved for as long as they are whole, down to 4."""
    levels = 1
    while height % 2**levels == width % 2**levels == 0 and min(height, width) // 2**levels >= STEP:
        levels += 1
    return levels


def plan_values(given: Mapping[str, Any], facts: DataFacts, device: Device) -> dict[str, Any]:
    """Values by flat name for a set of images and a device; the `given` ones stay, and the others follow from them.

    | value | rule |
    |---|---|
    | resolution | that of half of the images, else the median, by multiples of 4 down; at most 256 (CPU 32, MPS 64) |
    | num_heldout | a tenth of the images, at most 5000 |
    | group_by | patient for DICOM, file for volumes and other files of several images, where there are enough of them |
    | num_images | all others, except those of groups of which some are held out |
    | batch_size | a power of two, at least 16; at most an eighth of the images, 256 (CPU 64, MPS 128), |
    |  | and the pixels of 64 images of 64x64 (MPS 32 of them; CPU 64 of 16x16) |
    | block_channels | 128, 256, 256, 256, 512, 512 (CPU and MPS 32, 64, 64, 64), halved down to a side of 4 |
    | layers_per_block | 2 (CPU and MPS 1) |
    | attention_resolutions | 16 and 8 where they are levels; none on a CPU |
    | learning_rate | 2e-4 (CPU and MPS 1e-3, whose networks are narrow) |
    | mixed_precision | bf16 on a GPU that has it |
    | total_kimg | 1000 epochs, from 100 to 200 000 |
    | rampup_kimg, first_measurement_kimg | a fiftieth of it; the first measurement is at least 2 batches |
    | ema_halflife_kimg | a twentieth of it, at most EDM's 500 |
    | probe_images | all training images, at most 4096 (CPU and MPS 256) |
    | num_samples | 1024 (CPU and MPS 128) |
    | sample_steps | 18 (CPU 12) |
    """
    values, large = dict(given), device.kind == "cuda"

    def default(name: str, value: Any) -> Any:
        return values.setdefault(name, value)

    most = LARGEST_SIDE[device.kind]
    scale = min(1.0, most / max(facts.size))
    height, width = (max(STEP, int(side * scale) // STEP * STEP) for side in facts.size)
    network = network_of(values.get("family", "edm"), values.get("transformer", False))
    if network == TRANSFORMER:  # which takes squares
        height = width = min(height, width)
    size = parse_size(default("resolution", height if height == width else f"{height}x{width}"))
    height, width = height_width(size)
    heldout = default("num_heldout", min(facts.num_images // 10, MOST_HELDOUT))
    skipped = values.get("skip_images", 0)
    others = max(0, facts.num_images - heldout - skipped)
    if default("group_by", facts.group_by) and facts.groups:
        others = images_in_other_groups(facts.groups, heldout, values.get("seed", 0)) - skipped
    if others < 2 and "num_images" not in values:
        raise ValueError(_too_few(values, facts.num_images, others))
    num_images = default("num_images", others)
    pixels = BATCH_PIXELS[device.kind] / (height * width)
    batch = default("batch_size", _power_of_two(min(num_images / 8, pixels), 16, LARGEST_BATCH[device.kind]))
    if network == UNET and not values.get("init_from") and not values.get("autoencoder"):
        channels = default("block_channels", (GPU_CHANNELS if large else CPU_CHANNELS)[: _levels(height, width)])
        default("layers_per_block", 2 if large else 1)
        sides = [min(height, width) // 2**level for level in range(len(channels))]
        default("attention_resolutions", tuple(side for side in sides if side in ATTENTION_SIDES and large))
    default("learning_rate", 2e-4 if large else 1e-3)
    if device.bf16:
        default("mixed_precision", "bf16")
    total = default("total_kimg", float(min(max(num_images * EPOCHS / 1000, LEAST_KIMG), MOST_KIMG)))
    default("rampup_kimg", total / 50)
    default("first_measurement_kimg", min(total, max(total / 50, 2 * batch / 1000)))
    default("ema_halflife_kimg", min(500.0, total / 20))
    default("probe_images", min(num_images, 4096 if large else 256))
    default("num_samples", 1024 if large else 128)
    default("sample_steps", 12 if device.kind == "cpu" else 18)
    default("encoder", "auto")
    return values


def _too_few(values: Mapping[str, Any], total: int, remaining: int) -> str:
    """The error for a set that leaves fewer than two training images."""
    parts = [f"{name} is {values[name]}" for name in ("skip_images", "num_heldout", "group_by") if values.get(name)]
    settings = f"{', '.join(parts)}; " if parts else ""
    return (
        f"{settings}data {values['data']!r} has {total} images, of which {max(0, remaining)} remain to train on; "
        "expected 2 or more"
    )


def plan_for(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The plan for the given data on this machine, and lines that describe it. Raises ValueError without readable data."""
    facts = facts_of(str(given["data"]), str(given.get("data_split", "train")), given.get("group_by"))
    device = device_here()
    values = plan_values(given, facts, device)
    classes = "" if facts.num_classes is None else f", {facts.num_classes} classes"
    height, width = facts.size
    lines = [f"data: {facts.num_images} images of {height}x{width}, {facts.channels} channels{classes}; device: {device.kind}"]
    chosen = [f"{name}={_shown(value)}" for name, value in values.items() if name not in given]
    return values, [*lines, "plan: " + " ".join(chosen)]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)

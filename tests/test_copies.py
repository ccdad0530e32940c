"""Copies of real images, lightly changed: is the original the nearest by EfficientNet-Lite0, and by pixels?"""

from __future__ import annotations

import unicodedata
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.font_manager import findSystemFonts
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mlflow_icr.extraction.encoders import load_encoder
from mlflow_icr.generation import k_nearest

SIDE, COUNT = 64, 100
GLYPH = 109  # the one size that the font's bitmaps have


@pytest.fixture(scope="module")
def emoji() -> list[Image.Image]:
    """Different emoji on white, 64x64, of the Noto colour font: pictures with shape, colour and near relatives."""
    path = next((path for path in findSystemFonts() if Path(path).name == "NotoColorEmoji.ttf"), None)
    if path is None:
        pytest.skip("the font NotoColorEmoji.ttf is not installed (Debian: apt install fonts-noto-color-emoji)")
    font = ImageFont.truetype(path, GLYPH)
    found: dict[bytes, Image.Image] = {}
    for code in range(0x1F300, 0x1FAFF):
        if unicodedata.category(chr(code)) != "So":
            continue
        canvas = Image.new("RGB", (136, 136), "white")
        ImageDraw.Draw(canvas).text((0, 0), chr(code), font=font, embedded_color=True)
        found.setdefault(canvas.tobytes(), canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    images = list(found.values())
    order = np.random.default_rng(0).permutation(len(images))
    return [images[i] for i in order[:COUNT]]


def shifted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    dx, dy = rng.integers(3, 7, 2) * rng.choice([-1, 1], 2)
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, int(dx), 0, 1, int(dy)), fillcolor="white")


def cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    side = int(0.8 * SIDE)
    x, y = (int(v) for v in rng.integers(0, SIDE - side, 2))
    return image.resize(image.size, Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))


def rotated(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    angle = float(rng.uniform(8, 15) * rng.choice([-1, 1]))
    return image.rotate(angle, Image.Resampling.BICUBIC, fillcolor="white")


def recoloured(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    gains = rng.uniform(0.6, 1.0, 3)
    return Image.fromarray((np.asarray(image) * gains).astype(np.uint8))


def compressed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(15, 30)))
    return Image.open(file).convert("RGB")


CHANGES = (shifted, cropped, rotated, recoloured, compressed)


def stacked(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def test_efficientnet_finds_changed_copies_that_pixels_miss(emoji: list[Image.Image]) -> None:
    rng = np.random.default_rng(1)
    originals = stacked(emoji)
    copies = {change.__name__: stacked([change(image, rng) for image in emoji]) for change in CHANGES}
    found: dict[str, dict[str, float]] = {}
    for name in ("efficientnet_lite0", "pixels"):
        encoder = load_encoder(name, shape=originals.shape[1:])
        train = encoder(originals)
        found[name] = {}
        for kind, images in copies.items():
            nearest = k_nearest(encoder(images), train, 1).indices[:, 0]
            found[name][kind] = float((nearest == torch.arange(COUNT)).double().mean())
    network, pixels = found["efficientnet_lite0"], found["pixels"]
    assert min(network.values()) > 0.9, found
    assert np.mean(list(network.values())) > np.mean(list(pixels.values())) + 0.15, found
    # Where pixels move, pixels lose the original; where all stay in place, as in a JPEG, they are as good.
    for kind in ("shifted", "cropped"):
        assert network[kind] > pixels[kind] + 0.3, found
    assert pixels["compressed"] > 0.95, found

"""PNG, JPEG, WebP, BMP and GIF by Pillow; PNG of 16-bit colour by imagecodecs, since Pillow would keep 8 bits."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import IO

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from mlflow_icr.extraction.images.picture import Picture, refuse_bomb
from mlflow_icr.extraction.images.sources import FileSource

GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F"}
DEEP_MODES = {"I", "I;16", "I;16B", "I;16L", "F"}
TRANSPARENT_MODES = {"LA", "La", "PA", "RGBA", "RGBa"}
ANIMATED = {"GIF", "PNG", "WEBP"}  # not MPO, a photograph in several sizes whose first one is the whole image
BYTES_A_CHANNEL = {"I": 4, "F": 4, "I;16": 2, "I;16B": 2, "I;16L": 2}


def grey_level(background: str) -> int | None:
    """The grey level of a colour, 0 to 255; None where it is not grey."""
    red, green, blue = ImageColor.getrgb(background)[:3]
    return int(red) if red == green == blue else None


def check_background(background: str) -> None:
    """Raise ValueError for a text that is not an opaque colour."""
    try:
        opaque = len(ImageColor.getrgb(background)) == 3
    except ValueError:
        opaque = False
    if not opaque:
        raise ValueError(f"background is {background!r}; expected a colour, such as white, black or #808080")


def open_image(file: IO[bytes]) -> Image.Image:
    """An image whose pixels are not read yet. Raises ValueError where they would take a suspicious amount of memory."""
    stored = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = Image.open(file)
    except UnidentifiedImageError:
        raise ValueError("no image that Pillow knows" if stored else "an empty file") from None
    file.seek(0)
    refuse_bomb(image.width * image.height * len(image.getbands()) * BYTES_A_CHANNEL.get(image.mode, 1), stored)
    return image


def over_background(image: Image.Image, background: str) -> tuple[Image.Image, bool]:
    """An image of 8 bits in mode L or RGB, laid over the background, and whether some of it was transparent."""
    grey = image.mode in GREY_MODES
    if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema() != (255, 255):
            flat = Image.alpha_composite(Image.new("RGBA", image.size, background), layer)
            return flat.convert("L" if grey and grey_level(background) is not None else "RGB"), True
    return image.convert("L" if grey else "RGB"), False


def alpha_over(values: np.ndarray, background: str) -> tuple[np.ndarray, bool]:
    """Unsigned values (H, W, 2 or 4) over a background by their last channel, alpha: (H, W, 1 or 3); and if any was below 1."""
    white = np.iinfo(values.dtype).max
    colours, alpha = values[..., :-1].astype(np.float64), values[..., -1:] / white
    if (alpha == 1).all():
        return values[..., :-1], False
    beneath = np.asarray(ImageColor.getrgb(background)[:3], dtype=np.float64) / 255 * white
    if colours.shape[-1] == 1 and (level := grey_level(background)) is not None:
        beneath = np.asarray([level / 255 * white])
    return (colours * alpha + beneath * (1 - alpha)).round().astype(values.dtype), True


def from_pillow(image: Image.Image, background: str) -> Picture:
    """The picture of an opened image, upright. Pillow's deeper modes are all grey."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode in DEEP_MODES:
        return Picture(np.asarray(upright)[..., None])
    flat, over = over_background(upright, background)
    values = np.asarray(flat)
    return Picture(values.reshape(*values.shape[:2], -1), over=over)


def is_deep_png(image: Image.Image) -> bool:
    """Whether a PNG has 16 bits in several channels, of which Pillow keeps 8."""
    return (
        image.format == "PNG"
        and image.mode not in DEEP_MODES
        and any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    )


def _deep_png(content: bytes, background: str) -> Picture:
    try:
        from imagecodecs import png_decode
    except ImportError:
        raise ValueError("16 bits in several channels, which imagecodecs reads: pip install 'mlflow-icr[codecs]'") from None
    values = png_decode(content)
    values = values.reshape(*values.shape[:2], -1)
    if values.shape[2] in (2, 4):
        return Picture(*_with_stated(alpha_over(values, background)))
    return Picture(values)


def _with_stated(flattened: tuple[np.ndarray, bool]) -> tuple[np.ndarray, None, bool]:
    return flattened[0], None, flattened[1]


def pictures(source: FileSource, frames: Sequence[int], background: str) -> Iterator[Picture]:
    """The image of a file, or the first of an animation. Raises what damaged files make Pillow raise."""
    with source.open() as file, open_image(file) as image:
        animated = image.format in ANIMATED and getattr(image, "is_animated", False)
        picture = _deep_png(file.read(), background) if is_deep_png(image) else from_pillow(image, background)
        picture = replace(picture, animated=animated)
    for _ in frames:
        yield picture

"""Pictures inside the page, each within a number of bytes; larger ones are scaled down."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlflow_icr.reporting.markup import Markup, element

LARGEST_FILE = 64 * 2**20  # bytes of an image file that is opened at all
WIDEST = 1600  # pixels; more is not seen on a page
# Sizes tried for a picture that is too large, best first: a share of its width, and JPEG's quality.
SMALLER = ((1.0, 85), (0.75, 80), (0.5, 75), (0.35, 70), (0.25, 60))
# The formats that every browser shows; another is written as one of them.
SHOWN_AS_THEY_ARE = {"PNG": "image/png", "JPEG": "image/jpeg"}


@dataclass(frozen=True)
class Embedded:
    """A picture as a data URI with its size in pixels."""

    uri: str
    width: int
    height: int


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def embedded(content: bytes, most_bytes: int) -> Embedded:
    """An image file's content as a data URI of a picture of at most `most_bytes`, or the smallest that is tried.

    Raises ValueError for what is no image.
    """
    from PIL import Image, UnidentifiedImageError

    if len(content) > LARGEST_FILE:
        raise ValueError(f"it has {len(content) >> 20} MiB; expected at most {LARGEST_FILE >> 20}")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            kind = SHOWN_AS_THEY_ARE.get(image.format or "")
            if kind and len(content) <= most_bytes and image.width <= WIDEST:
                return Embedded(_uri(content, kind), image.width, image.height)
            plain = image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"it is no picture that can be read ({type(error).__name__})") from None
    small = b""
    width, height = plain.size
    for share, quality in SMALLER:
        scale = min(share, share * WIDEST / plain.width)
        width, height = max(1, round(plain.width * scale)), max(1, round(plain.height * scale))
        buffer = io.BytesIO()
        plain.resize((width, height), Image.Resampling.LANCZOS).save(buffer, format="jpeg", quality=quality)
        small = buffer.getvalue()
        if len(small) <= most_bytes:
            break
    return Embedded(_uri(small, "image/jpeg"), width, height)


def picture(read: Callable[[], bytes], caption: str, alternative: str, most_bytes: int) -> Markup:
    """A figure of one picture with its caption; for a picture that cannot be read, a text says why."""
    text = element("figcaption", caption)
    try:
        inline = embedded(read(), most_bytes)
    except (OSError, ValueError) as error:
        # An OSError's text may hold a path or an address.
        why = error if isinstance(error, ValueError) else type(error).__name__
        return element("figure", element("p", f"This picture is missing: {why}.", class_="quiet"), text, class_="picture")
    size = {"width": inline.width, "height": inline.height}
    image = element("img", src=inline.uri, alt=alternative, title=alternative, **size)
    return element("figure", image, text, class_="picture")


def spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spread and with the last; step 0 only where it is alone."""
    later = [step for step in sorted(steps) if step > 0] or sorted(steps)
    if len(later) <= count:
        return later
    places = {round(i * (len(later) - 1) / (count - 1)) for i in range(count)} if count > 1 else {len(later) - 1}
    return [later[place] for place in sorted(places)]

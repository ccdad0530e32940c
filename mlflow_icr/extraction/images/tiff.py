"""TIFF by tifffile, with pages as images, of any depth and number of channels; other encodings by Pillow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlflow_icr.extraction.images.picture import Picture, Span, refuse_bomb
from mlflow_icr.extraction.images.raster import alpha_over, from_pillow, open_image
from mlflow_icr.extraction.images.sources import FileSource, Header

MIN_IS_WHITE = 0
ALPHA = (1, 2)  # extra samples: premultiplied alpha or not
REDUCED = 1  # a page that is a smaller copy of another


@dataclass(frozen=True)
class _Frame:
    """An image of a file: which pages hold its channels, or, without pages of its own, its place in the series."""

    series: Any
    place: int
    pages: tuple[Any, ...]


def _frames(tiff: Any) -> list[_Frame]:
    """The images of a file, in its order: axes other than height, width and channels count them."""
    images = []
    for series in tiff.series:
        if series.keyframe.subfiletype & REDUCED:
            continue
        sizes = dict(zip(series.axes, series.shape, strict=True))
        planes = sizes.get("C", 1) if "S" not in sizes else 1
        counted = math.prod(size for axis, size in sizes.items() if axis not in "YXS")
        pages = list(series.pages)
        whole = len(pages) == counted
        for i in range(counted // planes):
            images.append(_Frame(series, i, tuple(pages[i * planes : (i + 1) * planes]) if whole else ()))
    return images


def _stated(page: Any) -> Span | None:
    """The span of values by the bits of a sample, where they are fewer than their container's; else None."""
    if page.dtype.kind != "u":
        return None
    highest = page.tags.get("MaxSampleValue")
    if highest is not None and np.max(highest.value) > 255:
        return 0.0, float(np.max(highest.value))
    bits = int(np.max(page.bitspersample))
    return (0.0, float(2**bits - 1)) if 8 < bits < 8 * page.dtype.itemsize else None


def header(source: FileSource) -> Header:
    """How many images a file holds, and what values they may have."""
    import tifffile

    with source.open() as file, tifffile.TiffFile(file) as tiff:
        frames = _frames(tiff)
        pages = [frame.series.keyframe for frame in frames]
        stated = {_stated(page) for page in pages}
        return Header(
            len(frames),
            all(int(np.max(p.bitspersample)) <= 8 and p.dtype.kind in "bu" for p in pages),
            stated.pop() if len(stated) == 1 else None,
        )


def _values(frame: _Frame) -> np.ndarray:
    """The values (H, W, C) of an image."""
    if frame.pages:
        planes = []
        for page in frame.pages:
            plane = page.asarray()
            axes = page.axes
            for axis in (i for i, name in reversed(list(enumerate(axes))) if name not in "YXS"):
                plane = plane.take(0, axis)
                axes = axes[:axis] + axes[axis + 1 :]
            planes.append(np.moveaxis(plane, axes.index("S"), -1) if "S" in axes else plane[..., None])
        return np.concatenate(planes, axis=-1)
    # Only the first image has a page; the others follow it in the file.
    series = frame.series
    values, axes = series.asarray(), series.axes
    kept_axes = [axes.index(axis) for axis in "YX"] + [i for i, axis in enumerate(axes) if axis in ("S", "C")][:1]
    values = np.moveaxis(values, kept_axes, range(-len(kept_axes), 0))
    values = values.reshape(-1, *values.shape[-len(kept_axes) :])[frame.place]
    return values if values.ndim == 3 else values[..., None]


def _upright(values: np.ndarray, page: Any) -> np.ndarray:
    """Values (H, W, C) turned upright by the tag Orientation, which tifffile ignores."""
    tag = page.tags.get("Orientation")
    match 1 if tag is None else int(tag.value):
        case 2:
            return values[:, ::-1]
        case 3:
            return values[::-1, ::-1]
        case 4:
            return values[::-1]
        case 5:
            return values.swapaxes(0, 1)
        case 6:
            return np.rot90(values, -1)
        case 7:
            return values[::-1, ::-1].swapaxes(0, 1)
        case 8:
            return np.rot90(values)
    return values


def _by_tifffile(frame: _Frame, background: str) -> Picture:
    page = frame.series.keyframe
    values, stated, over = _values(frame), _stated(page), False
    if page.photometric == MIN_IS_WHITE and values.dtype.kind == "u":
        values = (stated[1] if stated else np.iinfo(values.dtype).max) - values
        values = values.astype(page.dtype)
    if values.dtype.kind == "u" and len(page.extrasamples) == 1 and page.extrasamples[0] in ALPHA:
        values, over = alpha_over(values, background)
    return Picture(_upright(values, page), stated, over)


def pictures(source: FileSource, frames: Sequence[int], background: str) -> Iterator[Picture]:
    """The images with these numbers. Raises what damaged files make tifffile and Pillow raise."""
    import tifffile

    with source.open() as file, tifffile.TiffFile(file) as tiff:
        images = _frames(tiff)
        for number in frames:
            frame = images[number]
            page = frame.series.keyframe
            refuse_bomb(page.size * page.dtype.itemsize, tiff.filehandle.size)
            if page.dtype is not None and page.dtype.kind == "c":
                raise ValueError(f"values of type {page.dtype}; expected whole numbers or floats")
            bits = int(np.max(page.bitspersample))
            deep = bits > 8 or page.samplesperpixel > 4 or not frame.pages
            reason = ""
            # tifffile reads grey and RGB of bytes; Pillow reads fewer bits, palettes, CMYK and JPEG's colour spaces.
            if deep or (bits == 8 and page.photometric in (1, 2)):
                try:
                    yield _by_tifffile(frame, background)
                    continue
                except ValueError as error:  # a codec that is not installed
                    reason = str(error)
            if frame.pages and (bits <= 8 or page.samplesperpixel == 1):  # Pillow keeps 8 bits of several channels
                with source.open() as reopened, open_image(reopened) as image:
                    image.seek(frame.pages[0].index)
                    picture = from_pillow(image, background)
                yield Picture(picture.values, _stated(page), picture.over)
            else:
                raise ValueError(f"{reason}: pip install 'mlflow-icr[codecs]'" if "imagecodecs" in reason else reason)

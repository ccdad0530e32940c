"""Which values become black and white, and in how many bits values are kept without loss.

Bytes stay as they are. For deeper images, the range that the files state holds if all state the same (bits of a sample, as in
DICOM and TIFF). Otherwise the range is measured over the whole set, so that every subset has the same scale. Whole numbers from
0 on get the fewest bits that hold them (12-bit values in 16-bit files: 0 to 4095), unless they fill less than an eighth of
these. Floats in [0, 1] keep that range. Other values run from the lowest to the highest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlflow_icr.extraction.images.picture import Picture, Span, fit_array

BYTE: Span = (0.0, 255.0)
NARROW = 8  # values that fill less than 1/8 of their bits' range are signed with an offset, or inverted
MOST_STEPS = 65535  # of uint16


@dataclass(frozen=True)
class Extent:
    """Values of deeper images: the lowest and the highest, whether all are whole numbers, and the ranges that files state."""

    low: float = np.inf
    high: float = -np.inf
    whole: bool = True
    stated: frozenset[Span | None] = frozenset()

    def joined(self, other: Extent) -> Extent:
        """The extent of both together."""
        return Extent(
            min(self.low, other.low), max(self.high, other.high), self.whole and other.whole, self.stated | other.stated
        )

    @property
    def empty(self) -> bool:
        """Whether there were no deeper images."""
        return self.low > self.high


def extent_of(picture: Picture) -> Extent:
    """The extent of one image's values; empty for an image of bytes."""
    if picture.plain:
        return Extent()
    values = picture.values
    return Extent(float(values.min()), float(values.max()), values.dtype.kind in "ui", frozenset({picture.stated}))


def agreed_span(stated: frozenset[Span | None]) -> Span | None:
    """The range that all images state; None if one states none, or they differ."""
    return next(iter(stated)) if len(stated) == 1 else None


def measured_span(extent: Extent) -> Span:
    """The values of black and white of a set, from the stated ranges and its values. Raises ValueError for equal values."""
    agreed = agreed_span(extent.stated)
    if agreed is not None and agreed[0] <= extent.low and extent.high <= agreed[1]:
        return agreed
    if extent.low >= 0 and extent.whole:
        highest = float(2 ** max(8, int(extent.high).bit_length()) - 1)
        narrow = extent.low < extent.high < extent.low + highest / NARROW
        return (extent.low, extent.high) if narrow and highest > BYTE[1] else (0.0, highest)
    if extent.low >= 0 and extent.high <= 1 and not extent.whole:
        return 0.0, 1.0
    if extent.low == extent.high:
        raise ValueError(f"all values of the images are {extent.low:g}; expected a value_range of two numbers")
    return extent.low, extent.high


def describe_span(span: Span, extent: Extent | None) -> str:
    """The values of black and white with the reason, in a line."""
    ends = f"{span[0]:g} is black and {span[1]:g} white"
    if extent is None:
        return f"{ends}, as the files state"
    if agreed_span(extent.stated) == span:
        return f"{ends}, as the files state; values are {extent.low:g} to {extent.high:g}"
    bits = f" ({int(span[1]).bit_length()} bits)" if extent.whole and span[0] == 0 else ""
    return f"values from {extent.low:g} to {extent.high:g}, so {ends}{bits}; another choice: --value-range LOW HIGH"


@dataclass(frozen=True)
class Target:
    """The form of all images of a set: (channels, height, width), type, and the values of black and white for deeper images.

    `scaled` is whether bytes too are read by that span.
    """

    channels: int
    size: tuple[int, int]
    dtype: np.dtype[Any]
    span: Span | None = None
    scaled: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, *self.size

    def for_picture(self, picture: Picture) -> Target:
        """The target for this set and one more image: more channels or bits, or unchanged. A deeper image needs a known range.

        Raises ValueError for channels that do not go together.
        """
        channels = picture.values.shape[2]
        if channels != self.channels and self.channels and 1 not in (channels, self.channels):
            raise ValueError(f"{channels} channels, where others have {self.channels}")
        needed = self.dtype
        if not picture.plain or self.scaled:
            assert self.span is not None
            steps = self.span[1] - self.span[0]
            whole = picture.values.dtype.kind in "ui"
            needed = np.dtype(np.uint16 if whole and steps <= MOST_STEPS else np.float32)
            if whole and self.span == BYTE:
                needed = self.dtype
        return replace(self, channels=max(channels, self.channels), dtype=max(self.dtype, needed, key=lambda d: d.itemsize))


def placed(picture: Picture, target: Target) -> tuple[np.ndarray, int]:
    """An image (C, H, W) in the target's form, and how many of its values lay outside the span and were cut off."""
    values, outside = picture.values, 0
    if target.dtype != np.uint8 or not picture.plain:
        low, high = target.span if target.span is not None and (target.scaled or not picture.plain) else BYTE
        unit = (values.astype(np.float64) - low) / (high - low)
        outside = int(((unit < 0) | (unit > 1)).sum())
        unit = unit.clip(0, 1)
        if picture.values.shape[:2] != target.size:  # filters are Pillow's, in float32
            unit = fit_array(unit.astype(np.float32), target.size).clip(0, 1)
        if target.dtype == np.float32:
            values = unit.astype(np.float32)
        else:
            values = np.rint(unit * np.float64(np.iinfo(target.dtype).max)).astype(target.dtype)
    else:
        values = fit_array(values, target.size)
    if values.shape[2] != target.channels:
        values = np.repeat(values, target.channels, axis=2)
    return values.transpose(2, 0, 1), outside

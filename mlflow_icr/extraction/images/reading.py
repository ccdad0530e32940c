"""Read images of files into one tensor: each file once, several at a time, each image directly to its place."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from mlflow_icr.extraction.images.listing import ImageFiles, Listing, named, reason_of, unreadable_message
from mlflow_icr.extraction.images.picture import Picture, Size, Span, height_width
from mlflow_icr.extraction.images.raster import check_background
from mlflow_icr.extraction.images.store import Store
from mlflow_icr.extraction.images.values import (
    Extent,
    Target,
    agreed_span,
    describe_span,
    extent_of,
    measured_span,
    placed,
)

logger = logging.getLogger(__name__)

THREADS = 8  # at most: each has a file in memory


def check_value_range(value_range: Sequence[float]) -> Span | None:
    """A range from no or two numbers. Raises ValueError for others."""
    if not value_range:
        return None
    if len(value_range) != 2 or not -math.inf < value_range[0] < value_range[1] < math.inf:
        raise ValueError(f"value_range is {tuple(value_range)!r}; expected two numbers, the lower one first")
    return float(value_range[0]), float(value_range[1])


@dataclass(frozen=True)
class Reading:
    """How files become images: size (height, width), the values of black and white, and the colour behind transparent parts.

    Without `value_range` values are read as `mlflow_icr.extraction.images.values` says. Raises ValueError for an invalid size,
    range or colour.
    """

    size: tuple[int, int]
    value_range: Span | None = None
    background: str = "white"

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size is {self.size!r}; expected whole numbers >= 1")
        check_value_range(self.value_range or ())
        check_background(self.background)


@dataclass(frozen=True, eq=False)
class Read:
    """Images (N, C, H, W): uint8, uint16 (0 to 65535 from black to white) or float32 in [0, 1].

    Files that could not be read are left out and listed with their reasons; `notes` are remarks on ambiguous files.
    """

    images: Tensor
    unreadable: list[str]
    notes: list[str]
    sizes: dict[tuple[int, int], int]  # number of images by (height, width)
    items: list[int]  # their numbers in the listing's items


Visit = Callable[[int, Picture], None]  # called with an image's place among those asked for, and the image


class _Walk:
    """A pass over images: counts and extents so far, and whether it stops early."""

    def __init__(self) -> None:
        self.unreadable: dict[int, str] = {}  # by place
        self.counts: Counter[str] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.stopped = False
        self.lock = Lock()


class _Fill:
    """Writes images to their places in an array, and stops at the first image that needs another type or shape."""

    def __init__(self, array: np.ndarray | None, target: Target, walk: _Walk) -> None:
        self.array, self.target, self.walk = array, target, walk
        self.wider, self.needs_span = target, False

    def __call__(self, place: int, picture: Picture) -> None:
        deep = not picture.plain and self.target.span is None
        wider = self.target if deep else self.target.for_picture(picture)
        if self.array is None or deep or wider != self.target:
            with self.walk.lock:
                self.wider = wider if self.wider == self.target else self.wider
                self.needs_span |= deep
                self.walk.stopped = True
            return
        self.array[place], outside = placed(picture, self.target)
        with self.walk.lock:
            height, width = picture.values.shape[:2]
            self.walk.sizes[height, width] += 1
            smaller = height < self.target.size[0] or width < self.target.size[1]
            self.walk.counts.update(over=picture.over, enlarged=smaller, outside=outside, values=picture.values.size)
            self.walk.counts["animated"] += picture.animated


def _by_file(files: Listing, items: Sequence[int]) -> list[tuple[int, list[tuple[int, int]]]]:
    """For each needed file: the numbers of its images, rising, and their places among `items`."""
    by_file: dict[int, list[tuple[int, int]]] = {}
    for place, item in enumerate(items):
        number, frame = files.items[item]
        by_file.setdefault(number, []).append((frame, place))
    return [(number, sorted(by_file[number])) for number in sorted(by_file)]


def _read_file(
    files: Listing, number: int, frames: list[tuple[int, int]], background: str
) -> Iterator[tuple[int, Picture | Exception]]:
    """The images of a file with their places, or the error of one that cannot be read."""
    source, kind, done = files.files[number], files.formats[number], 0
    while done < len(frames):
        pictures = kind.pictures(source, [frame for frame, _ in frames[done:]], background)
        while done < len(frames):
            result: Picture | Exception
            try:
                result = next(pictures)
            except StopIteration:
                result = ValueError("fewer images than the file says")
            except Exception as error:  # a damaged file makes its library raise anything
                result = error
            yield frames[done][1], result
            done += 1
            if isinstance(result, Exception):
                break  # a generator that has raised cannot continue


def _walk(files: Listing, items: Sequence[int], background: str, visit: Visit, walk: _Walk) -> None:
    """Call `visit` with every image, several files at a time; stops early if `walk.stopped` is set."""

    def read_job(job: tuple[int, list[tuple[int, int]]]) -> None:
        if walk.stopped:
            return
        for place, picture in _read_file(files, job[0], job[1], background):
            try:
                if isinstance(picture, Exception):
                    raise picture
                visit(place, picture)
            except Exception as error:
                walk.unreadable[place] = f"{files.names[items[place]]} ({reason_of(error)})"
            if walk.stopped:
                return

    workers = min(THREADS, os.cpu_count() or 1)
    jobs = _by_file(files, items)
    if workers == 1 or len(jobs) == 1:
        for job in jobs:
            read_job(job)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(read_job, jobs):
            pass


def shapes(files: Listing, items: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """(height, width, channels) of each readable image among `items`. Raises ValueError where none can be read."""
    reasons, any_readable = [], False
    for item in items:
        number, frame = files.items[item]
        result = next(_read_file(files, number, [(frame, item)], "white"))[1]
        if isinstance(result, Picture):
            any_readable = True
            yield result.values.shape
        else:
            reasons.append(f"{files.names[item]} ({reason_of(result)})")
    if not any_readable:
        raise ValueError(f"{str(files.path)!r} holds no images that can be read: {named(reasons)}")


def first_size(files: Listing) -> tuple[int, int]:
    """(height, width) of the first image that can be read. Raises ValueError where none can."""
    return next(shapes(files, range(len(files))))[:2]


def measure_extent(files: Listing, background: str) -> Extent:
    """The extent of values of all images of more than 8 bits. Raises ValueError naming files that cannot be read."""
    extents: dict[int, Extent] = {}
    walk = _Walk()
    items = range(len(files))
    _walk(files, items, background, lambda place, picture: extents.__setitem__(place, extent_of(picture)), walk)
    if walk.unreadable:
        raise ValueError(unreadable_message(files.path, list(walk.unreadable.values()), len(items)))
    total = Extent()
    for extent in extents.values():
        total = total.joined(extent)
    return total


def _span(files: Listing, reading: Reading, notes: list[str]) -> Span:
    """The values of black and white for a set's images of more than 8 bits."""
    if reading.value_range is not None:
        return reading.value_range
    if files.scanned():  # the headers are enough; no pixels need be read
        agreed = agreed_span(frozenset(header.stated for header in files.headers if header.frames and not header.plain))
        if agreed is not None:
            notes.append(f"{str(files.path)!r}: {describe_span(agreed, None)}")
            return agreed
    extent = measure_extent(files, reading.background)
    span = measured_span(extent)
    notes.append(f"{str(files.path)!r}: {describe_span(span, extent)}")
    return span


def read_items(files: Listing, items: Sequence[int], reading: Reading, store: Store | None = None) -> Read:
    """The images with these numbers in `files.items`, in this order; those that cannot be read are left out and named.

    They have one channel if all are grey, else RGB, or the number that all have. Raises ValueError for images whose
    channels do not go together, and OSError where a disk has no room for them.
    """
    notes = list(files.notes)
    store = Store() if store is None else store
    target = Target(0, reading.size, np.dtype(np.uint8), reading.value_range, reading.value_range is not None)
    while True:  # more than twice only for sets that mix grey and colour, or depths
        array = store.new((len(items), *target.shape), target.dtype) if target.channels else None
        walk = _Walk()
        fill = _Fill(array, target, walk)
        _walk(files, items, reading.background, fill, walk)
        if not walk.stopped:
            break
        target = replace(fill.wider, span=_span(files, reading, notes)) if fill.needs_span else fill.wider
    unreadable = [walk.unreadable[place] for place in sorted(walk.unreadable)]
    if array is None:
        raise ValueError(f"{str(files.path)!r} holds no images that can be read: {named(unreadable)}")
    if unreadable:
        array = np.delete(array, sorted(walk.unreadable), axis=0)
    notes += _remarks(files, reading, walk.counts, len(items))
    kept = [item for place, item in enumerate(items) if place not in walk.unreadable]
    return Read(torch.from_numpy(array), unreadable, notes, walk.sizes, kept)


def _remarks(files: Listing, reading: Reading, counts: Counter[str], total: int) -> list[str]:
    path, lines = repr(str(files.path)), []
    if counts["over"]:
        lines.append(
            f"{path}: transparent parts of {counts['over']} of {total} images show {reading.background} (--background)"
        )
    if counts["outside"] and counts["values"]:
        share = 100 * counts["outside"] / counts["values"]
        lines.append(f"{path}: {share:.3g} % of the values are outside the range, and are cut off to black and white")
    if counts["animated"]:
        lines.append(f"{path}: {counts['animated']} of {total} images are animations; their first pictures are taken")
    if counts["enlarged"]:
        height, width = reading.size
        lines.append(f"{path}: {counts['enlarged']} of {total} images are smaller than {height}x{width}, and are enlarged")
    return lines


def read_whole(files: Listing, items: Sequence[int], reading: Reading, store: Store | None = None) -> Read:
    """Like `read_items`, but raises ValueError naming the images that cannot be read."""
    read = read_items(files, items, reading, store)
    if read.unreadable:
        raise ValueError(unreadable_message(files.path, read.unreadable, len(items)))
    return read


def load_folder(
    folder: Path | str,
    resolution: Size,
    *,
    value_range: Span | None = None,
    background: str = "white",
) -> Tensor:
    """All images of a folder, an archive or a file, in the order of their names, (N, C, H, W), as `Read.images`.

    `resolution` is a side or (height, width). A warning says how values were understood. Raises ValueError when there are no
    images, or naming the files that cannot be read.
    """
    files = ImageFiles(folder)
    read = read_whole(files, range(len(files)), Reading(height_width(resolution), value_range, background))
    for note in read.notes:
        logger.warning(note)
    return read.images

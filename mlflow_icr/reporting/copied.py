"""The training images that are likeliest copied, one by one: samples beside each, and its own error ratio over training.

All of it is recorded already: pictures of the likeliest copies, thumbnails of the probe images, and log error ratios by image.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from mlflow_icr.monitoring.grid import CAPTION
from mlflow_icr.reporting.charts import Curve, Frame, chart
from mlflow_icr.reporting.markup import Child, Markup, element, fold, images_text, joined, number
from mlflow_icr.reporting.material import RunMaterial
from mlflow_icr.reporting.pictures import LARGEST_FILE, picture, spread

LISTED = 8  # images that are shown
SHOWN = 6  # samples beside an image
WALLS = 12  # measurements whose pictures are searched for samples
CURVE_POINTS = 40  # measurements of the curve of an image
OWN_RATIO, LABEL = "repr/view_log_ratio", "label"
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # of a damaged file of arrays
BETWEEN = 2  # white lines between the tiles of a picture
RATIO = Frame("Own error ratio", "error on views / on the image", log_y=True)


@dataclass(frozen=True, eq=False)
class Pair:
    """A sample above its nearest training image, and below them the ratio of distances, (H, W, 3) uint8; when it was drawn."""

    images_seen: int
    tiles: np.ndarray


@dataclass(frozen=True, eq=False)
class CopiedImage:
    """A training image by its place in the training set; `ratios` (S,) are its own error ratios at the measurements `steps`.

    `others` (S, 3) are the 10 %, 50 % and 90 % quantiles of the ratios of all images, and `place` is its own among them at the
    end, 1 for the largest. They are empty, and None, where no ratios were recorded. `picture` is None where it was not kept.
    """

    image: int
    pairs: Sequence[Pair] = ()
    picture: np.ndarray | None = None
    label: int | None = None
    steps: Sequence[int] = ()
    ratios: np.ndarray = field(default_factory=lambda: np.empty(0))
    others: np.ndarray = field(default_factory=lambda: np.empty((0, 3)))
    place: int | None = None


def pairs_in(wall: np.ndarray, thumbnails: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The pairs in a picture of the likeliest copies (H, W, 3) uint8, the likeliest first, each with the place of its image.

    `thumbnails` (N, h, w, 3) uint8 are of training images. Pairs of other images are left out.
    """
    height, width = thumbnails.shape[1:3]
    places = {thumbnails[i].tobytes(): i for i in reversed(range(len(thumbnails)))}
    tall = 2 * height + BETWEEN + CAPTION
    pairs = []
    for top in range(0, wall.shape[0] - tall + 1, tall + BETWEEN):
        for left in range(0, wall.shape[1] - width + 1, width + BETWEEN):
            pair = wall[top : top + tall, left : left + width]
            place = places.get(pair[height + BETWEEN : -CAPTION].tobytes())
            if place is not None and (pair[-CAPTION:] < 255).any():  # the last row may end with white
                pairs.append((place, pair))
    return pairs


def _all_pairs(run: RunMaterial, thumbnails: np.ndarray) -> dict[int, list[Pair]]:
    """The pairs of each image, the newest first, in the order of the newest picture."""
    walls = run.pictures.get("nearest", {})
    pairs: dict[int, list[Pair]] = {}
    for step in reversed(spread(list(walls), WALLS)):
        try:
            content = walls[step]()
            if len(content) > LARGEST_FILE:
                continue
            with Image.open(io.BytesIO(content)) as opened:
                pixels = np.asarray(opened.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # the section on samples shows why
            continue
        for image, tiles in pairs_in(pixels, thumbnails):
            pairs.setdefault(image, []).append(Pair(step, tiles))
    return pairs


def _own_ratios(run: RunMaterial) -> tuple[list[int], np.ndarray]:
    """Measurements with error ratios by image, and these, (S, N)."""
    steps, rows = list[int](), list[np.ndarray]()
    for step in spread(list(run.probe), CURVE_POINTS):
        arrays = _arrays(run, step)
        if OWN_RATIO in arrays and (not rows or arrays[OWN_RATIO].shape == rows[0].shape):
            steps.append(step)
            rows.append(np.exp(arrays[OWN_RATIO].astype(np.float64).clip(-60, 60)))
    return steps, np.stack(rows) if rows else np.empty((0, 0))


def _arrays(run: RunMaterial, step: int) -> Mapping[str, np.ndarray]:
    try:
        return run.probe[step]()
    except UNREADABLE:
        return {}


def copied_images(run: RunMaterial) -> list[CopiedImage]:
    """The likeliest copied images: those of the newest picture of copies in its order, then those of the largest own ratio."""
    try:
        thumbnails = run.thumbnails() if run.thumbnails is not None else None
    except UNREADABLE:
        thumbnails = None
    if thumbnails is not None and thumbnails.ndim != 4:
        thumbnails = None
    pairs = {} if thumbnails is None else _all_pairs(run, thumbnails)
    newest = max(run.pictures.get("nearest", {}), default=-1)
    chosen = [image for image, own in pairs.items() if own[0].images_seen == newest]
    steps, ratios = _own_ratios(run)
    order = np.argsort(-ratios[-1], kind="stable").tolist() if len(ratios) else []
    chosen += [image for image in order if image not in chosen]
    labels = _arrays(run, max(run.probe)).get(LABEL) if run.probe else None
    quantiles = np.quantile(ratios, (0.1, 0.5, 0.9), axis=1).T if len(ratios) else np.empty((0, 3))
    return [
        CopiedImage(
            image,
            pairs.get(image, [])[:SHOWN],
            thumbnails[image] if thumbnails is not None and image < len(thumbnails) else None,
            int(labels[image]) if labels is not None and image < len(labels) else None,
            steps if image in order else (),
            ratios[:, image] if image in order else np.empty(0),
            quantiles,
            order.index(image) + 1 if image in order else None,
        )
        for image in chosen[:LISTED]
    ]


def _anchor(anchor: str, image: int) -> str:
    return f"{anchor}-image-{image}"


def image_links(images: Sequence[CopiedImage], anchor: str) -> Child:
    """A line of links to the parts of `images_section`; nothing where there are no images."""
    if not images:
        return None
    links = [joined(" ", element("a", f"{one.image}", href=f"#{_anchor(anchor, one.image)}")) for one in images]
    return element("p", "The likeliest copied training images, one by one:", links)


def images_section(images: Sequence[CopiedImage], anchor: str, most_bytes: int) -> Child:
    """A part for each image, folded; pictures take at most `most_bytes` each. Nothing where there are no images."""
    if not images:
        return None
    return fold("The likeliest copied training images, one by one", [_image(one, anchor, most_bytes) for one in images])


def _image(one: CopiedImage, anchor: str, most_bytes: int) -> Markup:
    named = f"Training image {one.image}" + ("" if one.label is None else f", class {one.label}")
    parts: list[Child] = [element("h4", named, id=_anchor(anchor, one.image))]
    if one.place is not None:
        place = f", place {one.place} among all images that were measured; 1 is the largest"
        parts.append(element("p", "Own error ratio at the end: ", number(float(one.ratios[-1])), place))
    beside: list[Child] = []
    if one.picture is not None:
        beside.append(picture(lambda: _png(_strip(one)), _caption(one), named, most_bytes))
    if len(one.steps) > 1:
        beside.append(chart(RATIO, _curves(one)))
    parts.append(element("div", beside, class_="charts"))
    return joined(parts)


def _caption(one: CopiedImage) -> str:
    if not one.pairs:
        return "The image. No sample among the likeliest copies is nearest to it."
    when = ", ".join(images_text(pair.images_seen) for pair in one.pairs)
    return (
        "Left: the image. Then samples, each above the image, which is nearest to it. The number is its distance as a share of "
        f"that to the second nearest. The newest is first, at {when} images seen."
    )


def _strip(one: CopiedImage) -> np.ndarray:
    """The image and its pairs side by side, (H, W, 3) uint8 on white."""
    assert one.picture is not None
    tiles = [one.picture, *(pair.tiles for pair in one.pairs)]
    height = max(len(tile) for tile in tiles)
    columns = [np.pad(tile, ((0, height - len(tile)), (0, 4), (0, 0)), constant_values=255) for tile in tiles]
    return np.concatenate(columns, axis=1)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def _curves(one: CopiedImage) -> list[Curve]:
    own = [(float(step), float(ratio)) for step, ratio in zip(one.steps, one.ratios, strict=True)]
    middle = [(float(step), float(median)) for step, (_, median, _) in zip(one.steps, one.others, strict=True)]
    band = [(float(step), float(low), float(high)) for step, (low, _, high) in zip(one.steps, one.others, strict=True)]
    others = Curve("all images: median, and 80 % of them", middle, band, colour=1, dashed=True)
    return [others, Curve(f"image {one.image}", own, colour=0)]

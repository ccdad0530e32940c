"""A page for each of the likeliest copied images: its own ratio over training, its copies, its neighbours, its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainers.experiments.paper.claims import Results
from trainers.experiments.paper.figures import logarithmic
from trainers.experiments.paper.origins import TURNED, likeliest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LISTED = 8  # of the likeliest copied images
GAP = 2  # pixels between the tiles of a picture of them
Row = Mapping[str, Any]


def page_name(role: str, image: int) -> str:
    """The file name of an image's page, without its ending; its pictures begin with it too."""
    return f"{role}-image-{image:03d}"


def ranks(rows: Sequence[Row]) -> dict[int, int]:
    """The place of each image by its distance to the others, 1 for the farthest."""
    return {row["image"]: place for place, row in enumerate(sorted(rows, key=lambda row: -row["to_others"]), 1)}


def curve_figure(rows: Sequence[Row], row: Row) -> Figure:
    """The own error ratio of one image over training, before those of all others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for other in rows:
        _curve(axes, other, color="0.8", lw=0.6, zorder=1)
    _curve(axes, row, color="C0", marker="o", ms=3, zorder=3)
    axes.axhline(TURNED, color="grey", lw=0.6, ls=":")
    for key, style, label in (("turned", "--", "its ratio turned"), ("first_copied", ":", "first copied")):
        if row[key] is not None:
            axes.axvline(row[key] / 1000, color="C3", ls=style, lw=1, label=label)
    axes.set(xlabel="thousand images seen", ylabel="own error ratio", xscale="log", yscale="log")
    logarithmic(axes.xaxis)
    logarithmic(axes.yaxis)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)
    return figure


def _curve(axes: Any, row: Row, **style: Any) -> None:
    points = [(step / 1000, ratio) for step, ratio in row["curve"] if step > 0]
    axes.plot([x for x, _ in points], [y for _, y in points], **style)


def strip(picture: Path, place: int, count: int) -> np.ndarray:
    """One of `count` rows of tiles (H, W, 3) uint8 of a picture of all likeliest images."""
    from PIL import Image

    with Image.open(picture) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    height = (len(pixels) + GAP) // count
    return pixels[place * height : (place + 1) * height - GAP]


def page_text(name: str, role: str, rows: Sequence[Row], row: Row) -> str:
    """One image's page as Markdown."""
    page, place = page_name(role, row["image"]), ranks(rows)[row["image"]]
    seen = {key: "not" if row[key] is None else f"at {row[key]:,.0f} images seen" for key in ("turned", "first_copied")}
    facts = [
        ("in the training set", f"{row['times']} time{'s' if row['times'] > 1 else ''}"),
        ("copies among the last samples", f"{row['copies']}"),
        ("first copied", seen["first_copied"]),
        (f"own error ratio above {TURNED:g} for good", seen["turned"]),
        ("own error ratio at the end", f"{row['ratio']:.2f}"),
        (
            "mean distance to its five nearest",
            f"{row['to_others']:.2f} of that by chance; place {place} of {len(rows)}, 1 is farthest",
        ),
        ("its five nearest", ", ".join(map(str, row["nearest"]))),
    ]
    lines = [f"# Image {row['image']} of {name}", "", "[The paper, reproduced](index.md#where-copies-come-from-outliers)", ""]
    lines += ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in facts), ""]
    lines += [
        "The image, the sample that is nearest to it, and its five nearest in the set:",
        "",
        f"![its row]({page}-row.png)",
        "",
    ]
    lines += ["Its own error ratio (blue) and those of all other images:", "", f"![own error ratio]({page}-curve.png)"]
    return "\n".join(lines) + "\n"


def write_image_pages(results: Results, place: Path, pictures: Path) -> None:
    """Write the pages and their pictures into a folder, in place of those there; `pictures` is the results' folder."""
    from PIL import Image

    for old in place.glob("*-image-*"):
        old.unlink()
    for name, result in sorted(results.items()):
        if not result.get("copies_picture"):
            continue
        role, rows = result["role"], result["origins"]
        chosen = likeliest(rows, LISTED)
        for order, row in enumerate(chosen):
            page = page_name(role, row["image"])
            (place / f"{page}.md").write_text(page_text(name, role, rows, row))
            curve_figure(rows, row).savefig(place / f"{page}-curve.png", dpi=70, metadata={"Software": None})
            tiles = Image.fromarray(strip(pictures / result["copies_picture"], order, len(chosen)))
            tiles.resize((3 * tiles.width, 3 * tiles.height), Image.Resampling.NEAREST).save(place / f"{page}-row.png")

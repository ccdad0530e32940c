"""The report on the likeliest copied images: the samples beside each are those that were recorded, and so is its curve."""

from __future__ import annotations

import io
import re
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlflow_icr import Report
from mlflow_icr.generation import memorization_ratio
from mlflow_icr.monitoring.grid import image_tiles
from mlflow_icr.monitoring.judgement import copy_wall
from mlflow_icr.reporting import gather_folder, write_report
from mlflow_icr.reporting.copied import copied_images
from mlflow_icr.tracking import Tracker
from tests.test_report import Parsed

COUNT, STEPS = 20, (0, 100, 200)
COPIED = 7  # the image that samples come to copy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a trainer leaves it: at the last step five samples are near image 7, one is near image 3."""
    rng = np.random.default_rng(0)
    train = torch.from_numpy(rng.integers(0, 256, (COUNT, 1, 8, 8), dtype=np.uint8))
    tracker = Tracker(tmp_path / "run", [])
    for step in STEPS:
        images = torch.from_numpy(rng.integers(0, 256, (6, 1, 8, 8), dtype=np.uint8))
        if step == STEPS[-1]:
            images = train[[COPIED] * 5 + [3]].clone()
            images[:, 0, 0, 0] = torch.arange(6) + 100  # the nearer to the image's own value, the likelier a copy
        near = memorization_ratio(images.flatten(1).float(), train.flatten(1).float())
        ratios = np.linspace(0.0, step / 100, COUNT)
        arrays = {"repr/view_log_ratio": ratios.astype(np.float32), "label": np.arange(COUNT) % 4}
        values = {"repr/icr": 0.5, "repr/view_error_ratio": float(np.exp(ratios.mean()))}
        tracker.record(Report(step, values, {"nearest": copy_wall(images, train, near)}, arrays=arrays))
    tracker.embedding("s", np.zeros((COUNT, 2)), image_tiles(train), [str(i) for i in range(COUNT)], STEPS[-1])
    tracker.close("FINISHED")
    return tmp_path / "run"


def test_each_likeliest_image_has_its_samples_and_its_own_ratio(folder: Path) -> None:
    found = copied_images(gather_folder(folder))
    assert len(found) == 8
    assert {found[0].image, found[1].image} == {COPIED, 3}
    assert [one.image for one in found[2:]] == [19, 18, 17, 16, 15, 14]  # then the largest ratios
    (copied,) = (one for one in found if one.image == COPIED)
    assert [pair.images_seen for pair in copied.pairs][:5] == [200] * 5
    with Image.open(folder / "images" / "nearest" / f"{200:012d}.png") as wall:
        pixels = np.asarray(wall.convert("RGB"))
    first = pixels[: len(copied.pairs[0].tiles), : copied.pairs[0].tiles.shape[1]]
    assert any(np.array_equal(first, one.pairs[0].tiles) for one in found[:2]), (
        "the first pair of the picture is that of another"
    )
    assert copied.picture is not None
    assert np.array_equal(copied.picture, copied.pairs[0].tiles[50:98])
    assert (copied.label, copied.place) == (COPIED % 4, COUNT - COPIED)
    assert list(copied.steps) == [100, 200]
    assert copied.ratios == pytest.approx(np.exp(np.array([1, 2]) * COPIED / (COUNT - 1)), rel=1e-5)
    assert copied.others[-1] == pytest.approx(np.exp([0.2, 1.0, 1.8]), rel=0.02)


def test_the_page_links_them_and_leaves_out_what_was_not_kept(folder: Path, tmp_path: Path) -> None:
    page = Parsed(write_report([folder], tmp_path / "page.html").read_text())
    links = [a["href"].removeprefix("#") for a in page.of("a")]
    assert len(links) == 8
    assert set(links) <= {a["id"] for _, a in page.tags if "id" in a}
    assert f"Training image {COPIED}, class {COPIED % 4}" in page.text
    shown = next(a for a in page.of("img") if a["alt"] == f"Training image {COPIED}, class {COPIED % 4}")
    with Image.open(io.BytesIO(b64decode(shown["src"].partition(",")[2]))) as picture:
        assert picture.width > 6 * 48  # the image, and five samples
    (folder / "embeddings" / "s.npz").write_bytes(b"damaged")  # pictures and samples are unknown then; ratios are not
    page = Parsed(write_report([folder], tmp_path / "page.html").read_text())
    assert [a["href"] for a in page.of("a")] == [f"#run-1-image-{i}" for i in range(19, 11, -1)]
    for path in (folder / "probe").iterdir():
        path.write_bytes(b"damaged")
    page = Parsed(write_report([folder], tmp_path / "page.html").read_text())
    assert not list(page.of("a"))
    assert not re.search("one by one", page.text)

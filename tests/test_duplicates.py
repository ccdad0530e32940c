"""Duplicates, exact and near, against brute force; and the command that lists them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlflow_icr.cli import main
from mlflow_icr.extraction.duplicates import duplicate_notes, exact_duplicates, pixel_hashes
from mlflow_icr.generation import near_duplicates
from mlflow_icr.generation.duplicates import chance_distance


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_pairs_are_those_of_brute_force(kind: torch.dtype, rng: np.random.Generator) -> None:
    rows = rng.normal(128, 30, (300, 20))
    rows[40:70] = rows[3] + rng.normal(0, 1, (30, 20))  # more than are asked for at first
    rows[200] = rows[100]
    x = torch.from_numpy(rows).to(kind)
    found = near_duplicates(x, 0.3)
    distances = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = (distances.triu(1) + torch.full_like(distances, torch.inf).tril() <= 0.3 * found.scale).nonzero()
    assert torch.equal(found.pairs, expected)
    assert len(expected) >= 30 * 31 / 2 + 1
    torch.testing.assert_close(found.distances * found.scale, distances[tuple(expected.T)], rtol=1e-12, atol=0)
    assert chance_distance(x) == pytest.approx(float(distances[~torch.eye(300, dtype=torch.bool)].median()), rel=0.03)
    assert found.groups(300) == [[3, *range(40, 70)], [100, 200]]


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(ValueError, match="two images by chance are the same"):
        near_duplicates(torch.ones(10, 3))
    with pytest.raises(ValueError, match=r"threshold is 1.5; expected a number in \[0, 1\)"):
        near_duplicates(torch.eye(3), 1.5)


def test_exact_copies_are_counted_in_a_line(rng: np.random.Generator) -> None:
    images = torch.from_numpy(rng.integers(0, 256, (10, 3, 4, 4), dtype=np.uint8))
    images[[4, 7]] = images[1].clone()
    images[9] = images[0].clone()
    assert exact_duplicates(pixel_hashes(images)) == [[0, 9], [1, 4, 7]]
    notes = duplicate_notes(images, images[4:6])
    assert notes[0].startswith("3 of 10 training images are exact duplicates of others")
    assert notes[1].startswith("2 training images are held out too")
    assert duplicate_notes(images[:4], images[5:6]) == []


def test_the_command_lists_copies_of_a_folder(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    y, x = np.mgrid[0:32, 0:32] / 32
    for i in range(12):
        a, b, c, d = rng.uniform(0, 6, 4)
        picture = np.stack([np.sin(a * x + b), np.sin(c * y + d), np.cos(a * y - c * x)], 2) * 120 + 128
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / f"{i:02}.png")
    Image.open(tmp_path / "03.png").save(tmp_path / "03 again.jpg", quality=85)
    (tmp_path / "05 copy.png").write_bytes((tmp_path / "05.png").read_bytes())
    (tmp_path / "bad.png").write_bytes(b"")
    assert main(["duplicates", "--data", str(tmp_path), "--resolution", "32"]) == 0
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert [(row["group"], row["image"], row["exact"]) for row in rows] == [
        ("0", "03 again.jpg", "false"), ("0", "03.png", "false"), ("1", "05 copy.png", "true"), ("1", "05.png", "true"),
    ]  # fmt: skip
    assert 0 < float(rows[0]["distance"]) < 0.15
    assert float(rows[2]["distance"]) == 0
    assert "14 images: 2 are near-duplicates of others, in 2 groups; 1 are exact" in printed.err
    assert "1 cannot be read, and are left out: bad.png" in printed.err
    assert main(["duplicates", "--data", str(tmp_path / "none")]) == 2

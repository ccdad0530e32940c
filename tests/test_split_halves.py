"""Two halves: their agreement against its closed form, and the comparison of two runs' checkpoints."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from trainers.config import load_config
from trainers.experiments.split_halves import (
    FOLDERS,
    ROLES,
    agreement,
    compare,
    halves_in,
    halves_of,
    plan,
    text,
    write,
)


def test_agreement_is_the_correlation_of_what_the_noise_decides(rng: np.random.Generator) -> None:
    shared, own = rng.standard_normal((1000, 40)), rng.standard_normal((2, 1000, 40))
    for share in (0.0, 0.3, 0.9):
        first, second = (torch.from_numpy(share**0.5 * shared + (1 - share) ** 0.5 * noise) for noise in own)
        found = agreement(first, second)
        assert found.value == pytest.approx(share, abs=0.02)  # four standard errors
        assert abs(found.value - share) < 2 * (found.high - found.low)
        assert agreement(second, first).value == pytest.approx(found.value)
        assert agreement(3 * first + 1, 3 * second + 1).value == pytest.approx(found.value)  # no scale, no origin
    assert agreement(first, first).value == 1
    with pytest.raises(ValueError, match="one and the same"):
        agreement(torch.zeros(5, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="expected one shape"):
        agreement(torch.zeros(5, 2), torch.zeros(4, 2))


def test_the_interval_holds_the_truth_as_often_as_it_says(rng: np.random.Generator) -> None:
    inside = 0
    for _ in range(300):
        shared, own = rng.standard_normal((40, 8)), rng.standard_normal((2, 40, 8))
        found = agreement(*(torch.from_numpy(0.5**0.5 * (shared + noise)) for noise in own))
        inside += found.low <= 0.5 <= found.high
    assert 0.89 <= inside / 300 <= 0.99


def test_halves_share_no_image_but_what_is_held_out() -> None:
    from trainers.data import data_of

    first, second = (data_of(config) for config in halves_of("digits", {"num_images": 800}).values())
    rows = [{image.numpy().tobytes() for image in data.train} for data in (first, second)]
    assert len(first.train) == len(second.train) == 800
    assert len(rows[0] & rows[1]) <= 5  # digits has some images twice
    assert first.heldout_sha256 == second.heldout_sha256
    with pytest.raises(ValueError, match="num_images is 801; expected at most 800, half of 'digits'"):
        halves_of("digits", {"num_images": 801})


def test_two_runs_are_compared_at_the_checkpoints_that_both_have(tmp_path: Path, pipeline: Path) -> None:
    configs = halves_of("digits", {"num_images": 64, "sample_steps": 4})
    for role in ROLES:
        folder = tmp_path / FOLDERS[role]
        for images_seen in (100, 200) if role == ROLES[0] else (100, 300):
            shutil.copytree(pipeline, folder / "checkpoints" / f"{images_seen:012d}")
        (folder / "config.yaml").write_text(yaml.safe_dump(configs[role].grouped()))
        rows = [{"images_seen": 100, "repr/icr": 0.5, "mem/ratio_l2": 0.25}, {"images_seen": 200, "mem/ratio_l2": 0.5}]
        (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    halves = halves_in(tmp_path)
    (found,) = compare(halves)
    # The same network twice: not one noise makes a difference.
    assert (found.images_seen, found.agreement) == (100, 1)
    assert (found.copies_first, found.verdict_first) == (0.25, "undecided")
    sheet, picture = write(halves, [found])
    with sheet.open() as file:
        assert next(csv.DictReader(file))["agreement"] == "1.0"
    assert picture.stat().st_size > 5000
    assert text([found]).startswith("agreement is highest at 100 images seen, 1.00")
    # Runs on the same images are no halves.
    shutil.copy(tmp_path / "first" / "config.yaml", tmp_path / "second" / "config.yaml")
    with pytest.raises(ValueError, match="share training images"):
        halves_in(tmp_path)
    with pytest.raises(ValueError, match="not empty"):
        plan([f"--output-dir={tmp_path}"])
    assert load_config("digits", {}).data.skip_images == 0


@pytest.mark.slow
def test_the_entry_point_trains_and_compares(tmp_path: Path) -> None:
    from trainers.experiments.split_halves import main

    arguments = ["--num-images=64", "--total-kimg=20", "--measurements=8", "--num-samples=32", "--block-channels=16,32"]
    assert main([*arguments, f"--output-dir={tmp_path / 'study'}"]) == 0
    with (tmp_path / "study" / "split_halves.csv").open() as file:
        rows = [{key: value for key, value in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == 9
    assert all(float(row["low"]) <= float(row["agreement"]) <= float(row["high"]) for row in rows)
    assert float(rows[0]["agreement"]) == 1  # of untrained networks, whose last layer is zero
    # They agree while they learn what digits share, and no longer when each has its own 64 by heart.
    assert float(rows[-1]["high"]) < max(float(row["low"]) for row in rows[1:])

"""Generated images of any program: reading them, judging them, and where the result goes."""

from __future__ import annotations

import csv
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mlflow_icr import frechet_distance, memorization_ratio
from mlflow_icr.cli import main
from mlflow_icr.extraction.images import read_images
from mlflow_icr.generation import Reference
from mlflow_icr.monitoring.grid import CAPTION
from mlflow_icr.monitoring.judgement import judge


def write(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def sets(tmp_path: Path, digits: Tensor) -> dict[str, Path]:
    generated = digits[40:60].clone()
    generated[:5] = digits[:5]  # copies
    return {
        "generated": write(tmp_path / "generated", generated),
        "train": write(tmp_path / "train", digits[:40]),
        "heldout": write(tmp_path / "heldout", digits[40:]),
    }


def test_folders_archives_and_arrays_hold_the_same_images(sets: dict[str, Path], tmp_path: Path, digits: Tensor) -> None:
    folder = read_images(sets["train"])
    assert torch.equal(folder.images, digits[:40])
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for path in sorted(sets["train"].iterdir()):
            archive.write(path, f"deep/{path.name}")
    assert torch.equal(read_images(tmp_path / "train.zip").images, folder.images)
    grey = folder.images[:, 0].numpy()
    colour = np.random.default_rng(0).integers(0, 256, (6, 10, 10, 3), dtype=np.uint8)
    for name, array, expected in (
        ("nhw", grey, folder.images),
        ("nhw1", grey[..., None], folder.images),
        ("n1hw", grey[:, None], folder.images),
        ("nhw3", colour, torch.from_numpy(colour).permute(0, 3, 1, 2)),
        ("n3hw", colour.transpose(0, 3, 1, 2), torch.from_numpy(colour).permute(0, 3, 1, 2)),
    ):
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
        assert torch.equal(read_images(tmp_path / f"{name}.npz").images, expected), name
    half = read_images(sets["train"], 4)
    assert half.images.shape == (40, 1, 4, 4)


def test_what_cannot_be_read_is_named(sets: dict[str, Path], tmp_path: Path) -> None:
    (sets["train"] / "007.png").write_bytes(b"no image")
    whole = sets["train"] / "008.png"
    whole.write_bytes(whole.read_bytes()[:50])
    found = read_images(sets["train"])
    assert len(found.images) == 38
    assert [Path(name.split(" (")[0]).name for name in found.unreadable] == ["007.png", "008.png"]
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "complex.npz", np.zeros((2, 8, 8), complex))
    np.savez(tmp_path / "objects.npz", np.array([{"a": 1}], dtype=object))
    Image.new("L", (8, 9)).save(sets["heldout"] / "odd.png")
    for path, message in (
        (tmp_path / "empty", "holds no images"),
        (tmp_path / "none", "neither a folder, nor a .zip or .npz"),
        (tmp_path / "complex.npz", "values of type complex128; expected whole numbers or floats"),
        (tmp_path / "objects.npz", "allow_pickle=False"),
        (sets["heldout"], "images of 8x8, 8x9 pixels; expected squares of one size, or --resolution"),
    ):
        with pytest.raises(ValueError, match=message):
            read_images(path)


def test_the_command_judges_what_another_program_made(
    sets: dict[str, Path], tmp_path: Path, digits: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["measure", *(part for name, path in sets.items() for part in (f"--{name}", str(path)))]
    (sets["generated"] / "bad.png").write_bytes(b"")
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert "generated: 20 images of" in captured.err
    assert "generated: 1 cannot be read, and are left out:" in captured.err
    assert "bad.png" in captured.err
    assert "gen/fd_pixels is of 20 and 24 images in 64 dimensions: too few" in captured.err
    fake, train = (read_images(sets[name]).images.flatten(1).float() / 255 for name in ("generated", "train"))
    heldout = digits[40:].flatten(1).float() / 255
    copies = memorization_ratio(fake, train)
    assert copies.value >= 0.25
    assert values["mem/ratio_l2"] == copies.value
    assert values["gen/fd_pixels"] == frechet_distance(fake, heldout)
    assert values["gen/num_samples"] == 20
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
    assert [float(row["distance_ratio"]) for row in rows] == sorted(copies.scores.tolist())
    assert {(int(row["generated"]), int(row["nearest_training"])) for row in rows[:5]} == {(i, i) for i in range(5)}
    with Image.open(tmp_path / "out" / "nearest.png") as wall:
        assert wall.size == (8 * 50 - 2, 2 * (48 + 2 + 48 + CAPTION + 2) - 2)
    assert main(["measure", "--generated", str(sets["generated"])]) == 2
    assert "train is not given" in capsys.readouterr().err
    assert main(["measure"]) == 2
    assert "expected CHECKPOINT --data FOLDER, or --generated and --train" in capsys.readouterr().err
    assert main([*command, "--encoder", "inception"]) == 2
    assert "get them from https://nvlabs" in capsys.readouterr().err


def test_it_can_be_logged_to_a_finished_run(sets: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    import mlflow

    with mlflow.start_run() as run:
        mlflow.log_metric("loss", 1.0)
    command = ["measure", "--generated", str(sets["generated"]), "--train", str(sets["train"]), "--run-id", run.info.run_id]
    assert main([*command, "--images-seen", "5000"]) == 0
    client = mlflow.MlflowClient()
    (metric,) = client.get_metric_history(run.info.run_id, "mem/ratio_l2")
    assert (metric.step, metric.value) == (5000, json.loads(capsys.readouterr().out)["mem/ratio_l2"])
    found = client.get_run(run.info.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["absent.gen/fd_pixels"] == "there are no held-out images to compare with"
    assert mlflow.active_run() is None
    running = client.create_run("0").info.run_id  # another process is at it
    assert main([*command[:-1], running]) == 0
    found = client.get_run(running)
    assert (found.info.status, found.info.end_time) == ("RUNNING", None)
    assert "mem/ratio_l2" in found.data.metrics


def test_sets_of_different_kinds_are_refused(sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "colour.npz", np.zeros((3, 8, 8, 3), dtype=np.uint8))
    assert main(["measure", "--generated", str(tmp_path / "colour.npz"), "--train", str(sets["train"])]) == 2
    assert "generated images are (3, 8, 8), training images (1, 8, 8); expected the same" in capsys.readouterr().err


def test_a_judgement_is_the_metrics_by_their_keys(rng: np.random.Generator) -> None:
    fake, train, heldout = (torch.from_numpy(rng.standard_normal((n, 6))) for n in (80, 90, 70))
    train, heldout = Reference(train), Reference(heldout)
    found = judge(fake, train, heldout, "net")
    assert found.warnings == {}
    assert found.absent == {}
    assert found.values["mem/ratio_net"] == memorization_ratio(fake, train.embeddings).value
    assert found.values["gen/fd_train_net"] == pytest.approx(frechet_distance(fake, train.embeddings), rel=1e-9)
    assert found.values["mem/carlini_low"] <= found.values["mem/carlini"] <= found.values["mem/carlini_high"]
    alone = judge(fake[:4], Reference(train.embeddings[:20]), None, "sscd")
    assert "needs 50 training images; there are 20" in alone.absent["mem/carlini"]
    assert alone.absent["gen/precision"] == "there are no held-out images to compare with"
    assert 0 <= alone.values["mem/copies_sscd"] <= 1
    assert alone.values.keys().isdisjoint(alone.absent)
    one = judge(fake[:1], train, heldout, "net")
    for key in ("gen/kid_net", "gen/fd_net", "gen/fd_train_net", "gen/fd_gap_net"):
        assert one.absent[key] == "needs at least 2 images on both sides; 1 on one"
    assert one.values["mem/ratio_net"] in (0, 1)
    far = judge(1e55 * fake, train, heldout, "net")
    assert all(math.isfinite(value) for value in far.values.values())
    assert "the embeddings are too far apart" in far.absent["gen/kid_net"]  # inf less inf
    few = judge(fake[:4], train, heldout, "net")
    assert "needs more than 5" in few.absent["gen/recall"]
    assert "no cell holds" in few.absent["mem/ct"]

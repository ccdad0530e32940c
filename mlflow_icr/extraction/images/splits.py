"""Parts of a set by the names of its folders (or tables): train, validation and test, and masks beside images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "validation", "valid": "validation"}
SPLITS |= {"validation": "validation", "dev": "validation"}

IMAGES = frozenset({"image", "images", "img", "imgs"})
ANNOTATIONS = frozenset(
    {"mask", "masks", "seg", "segmentation", "segmentations", "annotation", "annotations", "groundtruth", "gt"}
)
ANNOTATIONS |= {"label", "labels", "ground_truth"}


def beside_images(names: Sequence[str]) -> set[str]:
    """The files in folders of masks or other annotations; none where no folder is called `images`."""
    folders = {name: {part.lower() for part in PurePosixPath(name).parts[:-1]} for name in names}
    if not any(parts & IMAGES for parts in folders.values()):
        return set()
    return {name for name, parts in folders.items() if parts & ANNOTATIONS and not parts & IMAGES}


def split_of(name: str, by_stem: bool) -> str:
    """The split that a file's folders name, or with `by_stem` the beginning of its own name; empty without one."""
    path = PurePosixPath(name)
    parts = [part.lower() for part in path.parts[:-1]]
    if by_stem:
        parts.append(re.split(r"[-._]", path.name.lower())[0])
    return next((SPLITS[part] for part in parts if part in SPLITS), "")


def one_split(names: Sequence[str], split: str, by_stem: bool) -> tuple[list[int], str]:
    """The places of the files of one split, and a remark on the others; all places where files are not in several splits.

    Raises ValueError for an unknown split.
    """
    splits = [split_of(name, by_stem) for name in names]
    counts = Counter(splits)
    if "" in counts or len(counts) < 2:
        return list(range(len(names))), ""
    wanted = SPLITS.get(split.lower(), split)
    if wanted not in counts:
        raise ValueError(f"data_split is {split!r}; expected one of {', '.join(sorted(counts))}, the splits of the data")
    others = ", ".join(f"{count} of {name}" for name, count in counts.items() if name != wanted)
    places = [place for place, file_split in enumerate(splits) if file_split == wanted]
    return places, f"its {counts[wanted]} files of the split {wanted} are taken, and {others} left aside"

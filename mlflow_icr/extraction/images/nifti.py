"""NIfTI by nibabel: a volume's slices across the body's axis, upright as one looks at them, with their scaling applied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mlflow_icr.extraction.images.picture import Picture
from mlflow_icr.extraction.images.sources import FileSource, Header

MOST_SLICE_BYTES = 2**30


def _load(path: Any) -> Any:
    try:
        import nibabel
    except ImportError:
        raise ValueError("NIfTI, which nibabel reads: pip install 'mlflow-icr[nifti]'") from None
    return nibabel.load(path, keep_file_open=True)  # else each slice of a packed volume would unpack all before it


def _shape(image: Any) -> tuple[int, int, int, int]:
    """(X, Y, Z, T) of a volume or a series of them."""
    shape = tuple(int(size) for size in image.shape)
    if len(shape) < 2 or any(size != 1 for size in shape[4:]) or image.get_data_dtype().kind not in "uif":
        raise ValueError(f"a volume of {shape} {image.get_data_dtype()}; expected 2 to 4 dimensions of numbers")
    padded = (*shape[:4], 1, 1)
    if padded[0] * padded[1] * image.get_data_dtype().itemsize > MOST_SLICE_BYTES:
        raise ValueError(f"a volume of {shape}, whose slices would take more than 1 GiB each")
    return padded[0], padded[1], padded[2], padded[3]


def _orientation(image: Any) -> list[tuple[int, bool]]:
    """For each of right, front and up: the axis along it, and whether that axis runs in the opposite direction."""
    from nibabel.orientations import io_orientation

    orientation = io_orientation(image.affine)  # (3, 2): each axis's direction among the three, and its sign
    if np.isnan(orientation).any():
        return [(0, False), (1, False), (2, False)]
    axes = [int(np.flatnonzero(orientation[:, 0] == way)[0]) for way in range(3)]
    return [(axis, bool(orientation[axis, 1] < 0)) for axis in axes]


def header(source: FileSource) -> Header:
    """The number of slices in a volume. Bytes without scaling are plain; a file does not state the range of other values."""
    with source.on_disk() as path:
        image = _load(path)
        shape = _shape(image)
        up = _orientation(image)[2][0]
        scaled = getattr(image.dataobj, "slope", 1), getattr(image.dataobj, "inter", 0)
        plain = image.get_data_dtype() == np.uint8 and scaled in ((1, 0), (1.0, 0.0))
        return Header(shape[up] * shape[3], plain)


def pictures(source: FileSource, frames: Sequence[int], background: str) -> Iterator[Picture]:
    """The slices with these numbers, from the feet up, volume after volume: the front is above, the body's right is right."""
    with source.on_disk() as path:
        image = _load(path)
        shape = _shape(image)
        (right, right_flipped), (front, front_flipped), (up, up_flipped) = _orientation(image)
        for number in frames:
            time, place = divmod(number, shape[up])
            where: list[Any] = [slice(None)] * len(image.shape)
            if up < len(where):
                where[up] = shape[up] - 1 - place if up_flipped else place
            if len(where) > 3:
                where[3:] = [time] + [0] * (len(where) - 4)
            plane = np.asarray(image.dataobj[tuple(where)])
            plane = plane if right < front else plane.T  # (right, front)
            plane = plane[::-1] if right_flipped else plane
            plane = plane[:, ::-1] if front_flipped else plane
            yield Picture(np.ascontiguousarray(plane.T[::-1])[..., None])

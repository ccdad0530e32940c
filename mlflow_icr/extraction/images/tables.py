"""Tables: Parquet by pyarrow, read a row group at a time, and Arrow, mapped, as `datasets` saves it.

Images in them are encoded files, or nested lists.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlflow_icr.extraction.images import raster
from mlflow_icr.extraction.images.picture import Picture
from mlflow_icr.extraction.images.sources import FileSource, Header

IMAGES = ("image", "images", "img", "picture", "photo", "jpg", "png", "pixels", "pixel_values")
LABELS = ("label", "labels", "class", "target", "y", "fine_label")


class _Cell:
    """The bytes of an encoded image, as a reader of one file."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def names(self) -> list[str]:
        """None: it has no name."""
        return []

    def read(self, name: str) -> bytes:
        """The bytes."""
        return self.content

    def path_of(self, name: str) -> None:
        """None: there is no such file."""
        return


def cell_picture(value: Any, background: str) -> Picture:
    """The image in a table's cell: a mapping with `bytes` or `path`, bytes, or nested lists of numbers.

    Raises ValueError for anything else, and what damaged images raise.
    """
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        if content is None and path:
            with open(path, "rb") as file:
                content = file.read()
        value = content
    if isinstance(value, bytes):
        from mlflow_icr.extraction.images import tiff

        cell = FileSource("", _Cell(value))
        reader = tiff.pictures if value[:4] in (b"II*\0", b"MM\0*") else raster.pictures
        return next(iter(reader(cell, [0], background)))
    if value is None:
        raise ValueError("no image")
    values = np.array(value)
    if values.ndim == 3 and values.shape[0] <= 4 < values.shape[2]:
        values = np.moveaxis(values, 0, -1)
    return Picture(values if values.ndim == 3 else values[..., None])


@dataclass(frozen=True)
class _Table:
    """A table's schema, the number of rows in each part, and a function that returns a column of a part."""

    schema: Any
    counts: Sequence[int]
    column: Callable[[int, str], Any]


@contextmanager
def _open(source: FileSource) -> Iterator[_Table]:
    """A table in a file: Parquet, or a stream of Arrow's, as `datasets` saves it."""
    import pyarrow as pa
    import pyarrow.parquet

    with source.open() as file:
        if source.name.lower().endswith(".arrow"):
            mapped = file if source.path is None else pa.memory_map(str(source.path))
            table = pa.ipc.open_stream(mapped).read_all()
            yield _Table(table.schema, [table.num_rows], lambda part, column: table.column(column))
            return
        parquet = pyarrow.parquet.ParquetFile(file)
        counts = [parquet.metadata.row_group(part).num_rows for part in range(parquet.metadata.num_row_groups)]
        yield _Table(
            parquet.schema_arrow, counts, lambda part, column: parquet.read_row_group(part, columns=[column]).column(0)
        )


def _holds_images(kind: Any) -> bool:
    """Whether a column of a type may hold encoded files, or nested lists."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return "bytes" in {kind.field(i).name for i in range(kind.num_fields)}
    nested = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or (nested and pa.types.is_nested(kind.value_type))


def _image_column(schema: Any) -> str:
    """The column with images: the one that `datasets` declares, else one named in IMAGES, else the first that may hold some.

    Raises ValueError where there is none.
    """
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    for column in schema.names:
        if isinstance(features.get(column), dict) and features[column].get("_type") == "Image":
            return str(column)
    columns = [str(column.name) for column in schema if _holds_images(column.type)]
    usual = [column for column in columns if column.lower() in IMAGES]
    if columns:
        return (usual or columns)[0]
    raise ValueError(f"its columns ({', '.join(schema.names)}) hold no images")


def _labels(table: _Table) -> list[Any] | None:
    import pyarrow as pa

    for name in LABELS:
        kind = table.schema.field(name).type if name in table.schema.names else None
        if kind is not None and (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            values = [value for part in range(len(table.counts)) for value in table.column(part, name).to_pylist()]
            return None if any(value is None for value in values) else values
    return None


def header(source: FileSource) -> Header:
    """The number of rows in a file, and their classes from the first column of LABELS with whole numbers or texts."""
    with _open(source) as table:
        _image_column(table.schema)
        return Header(sum(table.counts), labels=_labels(table))


def pictures(source: FileSource, frames: Sequence[int], background: str) -> Iterator[Picture]:
    """The images of these rows, in rising order; a row group is in memory at a time."""
    with _open(source) as table:
        column, first, numbers = _image_column(table.schema), 0, list(frames)
        for part, count in enumerate(table.counts):
            numbers_here = [number for number in numbers if first <= number < first + count]
            if numbers_here:
                cells = table.column(part, column)
                for number in numbers_here:
                    yield cell_picture(cells[number - first].as_py(), background)
            first += count

"""Tables: Parquet by pyarrow, a row group at a time; rows of `datasets`. Images in them are encoded files, or nested lists."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlflow_icr.extraction.images import raster
from mlflow_icr.extraction.images.picture import Picture
from mlflow_icr.extraction.images.sources import FileSource, Header

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


def _open(file: Any) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file)


def _image_column(table: Any) -> str:
    """The first column with images. Raises ValueError where there is none."""
    import pyarrow as pa

    schema = table.schema_arrow
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    for column in schema.names:
        if isinstance(features.get(column), dict) and features[column].get("_type") == "Image":
            return str(column)
    for column in schema:
        kind = column.type
        if pa.types.is_struct(kind) and "bytes" in {kind.field(i).name for i in range(kind.num_fields)}:
            return str(column.name)
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return str(column.name)
        nested = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)
        if nested and pa.types.is_nested(kind.value_type):
            return str(column.name)
    raise ValueError(f"its columns ({', '.join(schema.names)}) hold no images")


def _labels(table: Any) -> list[int] | None:
    import pyarrow as pa

    schema = table.schema_arrow
    for name in LABELS:
        if name in schema.names and pa.types.is_integer(schema.field(name).type):
            values = table.read(columns=[name]).column(name).to_pylist()
            return None if any(value is None for value in values) else values
    return None


def header(source: FileSource) -> Header:
    """How many rows a file has, and their classes where a column of whole numbers is called so."""
    with source.open() as file:
        table = _open(file)
        _image_column(table)
        return Header(table.metadata.num_rows, labels=_labels(table))


def pictures(source: FileSource, frames: Sequence[int], background: str) -> Iterator[Picture]:
    """The images of these rows, in rising order; a row group is in memory at a time."""
    with source.open() as file:
        table = _open(file)
        column, first, wanted = _image_column(table), 0, list(frames)
        for group in range(table.metadata.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            numbers_here = [number for number in wanted if first <= number < first + count]
            if numbers_here:
                cells = table.read_row_group(group, columns=[column]).column(0)
                for number in numbers_here:
                    yield cell_picture(cells[number - first].as_py(), background)
            first += count

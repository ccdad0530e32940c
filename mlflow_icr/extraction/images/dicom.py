"""DICOM by pydicom: values after the modality's rescaling, such as Hounsfield units; MONOCHROME1 is inverted."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mlflow_icr.extraction.images.picture import Picture, Span, refuse_bomb
from mlflow_icr.extraction.images.sources import FileSource, Header

GROUPS = (b"\x02\0", b"\x08\0")  # of the first element of a file
NEEDED = ("PhotometricInterpretation", "BitsAllocated", "BitsStored")
FULL_BITS = 16  # where all bits of the container are used, they do not tell the range of values


def _read(source: FileSource, **options: Any) -> Any:
    try:
        import pydicom
    except ImportError:
        raise ValueError("DICOM, which pydicom reads: pip install 'mlflow-icr[dicom]'") from None
    from pydicom.uid import ImplicitVRLittleEndian

    with source.open() as file:
        begin = file.read(132)
        file.seek(0)
        bare = begin[128:] != b"DICM" and begin[:2] in GROUPS  # without the preamble, as older programs write them
        ds = pydicom.dcmread(io.BytesIO(file.read()) if not options else file, force=bare, **options)
    if bare and "TransferSyntaxUID" not in ds.file_meta:
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return ds


def _rescaling(ds: Any, frame: int) -> tuple[float, float]:
    """Slope and intercept of a frame: the image's, or in an enhanced image those of all frames or of this one."""
    datasets = [ds]
    for groups, number in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", frame)):
        sequence = ds.get(groups) or []
        if number < len(sequence):
            datasets.extend(sequence[number].get("PixelValueTransformationSequence") or [])
    slope, intercept = 1.0, 0.0
    for dataset in datasets:
        if dataset.get("RescaleSlope") not in (None, ""):  # it may be present, and empty
            slope, intercept = float(dataset.RescaleSlope), float(dataset.get("RescaleIntercept") or 0)
    return slope, intercept


def _stored_span(ds: Any) -> tuple[int, int]:
    """The lowest and the highest value that the stored bits can have."""
    bits = int(ds.BitsStored)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if int(ds.get("PixelRepresentation", 0)) else (0, 2**bits - 1)


def _is_colour(ds: Any) -> bool:
    return int(ds.get("SamplesPerPixel", 1)) > 1 or "PALETTE" in str(ds.PhotometricInterpretation)


def _stated(ds: Any, frame: int) -> Span | None:
    """The span of a frame's values by its stored bits; None where they fill their container of 16."""
    if _is_colour(ds) or int(ds.BitsStored) >= FULL_BITS:
        return None
    slope, intercept = _rescaling(ds, frame)
    ends = sorted(slope * value + intercept for value in _stored_span(ds))
    return ends[0], ends[1]


def _is_plain(ds: Any) -> bool:
    return int(ds.BitsStored) == 8 and all(_rescaling(ds, i) == (1.0, 0.0) for i in range(_count(ds)))


def _count(ds: Any) -> int:
    return int(ds.get("NumberOfFrames") or 1)


def header(source: FileSource) -> Header:
    """The number of images in a file (0 for a report or a directory), the range of their values, and the patient."""
    ds = _read(source, stop_before_pixels=True)
    if "Rows" not in ds or "Columns" not in ds:
        return Header(0)
    if missing := [name for name in NEEDED if name not in ds]:
        raise ValueError(f"without {missing[0]}")
    stated = {_stated(ds, i) for i in range(_count(ds))}
    subject = str(ds.get("PatientID") or "").strip()
    return Header(_count(ds), _is_plain(ds), stated.pop() if len(stated) == 1 else None, subject)


def _decoded(ds: Any, number: int) -> np.ndarray:
    """The stored values of a frame. Raises ValueError where they are packed in a way that no installed package reads."""
    from pydicom.pixels import pixel_array

    try:
        return pixel_array(ds, index=number)
    except RuntimeError as error:
        if "missing dependencies" not in str(error):
            raise
        packed = ds.file_meta.TransferSyntaxUID.name
        raise ValueError(f"packed by {packed}: pip install 'pylibjpeg[all]'") from None


def pictures(source: FileSource, frames: Sequence[int], background: str) -> Iterator[Picture]:
    """The images with these numbers. Raises what pydicom raises for damaged files, or without a decoder for their pixels."""
    ds = _read(source)
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    if "PixelData" not in ds:
        raise ValueError("without PixelData")

    samples, size = int(ds.get("SamplesPerPixel", 1)), int(ds.Rows) * int(ds.Columns)
    refuse_bomb(size * samples * int(ds.BitsAllocated) // 8, len(ds.PixelData) // max(1, _count(ds)))
    for number in frames:
        values = _decoded(ds, number)
        if "PALETTE" in str(ds.PhotometricInterpretation):
            values = apply_color_lut(values, ds)
        if _is_colour(ds):
            if values.dtype == np.uint16 and not (values & 255).any():  # some palettes keep bytes in the upper half
                values = (values >> 8).astype(np.uint8)
            yield Picture(values)
            continue
        if ds.PhotometricInterpretation == "MONOCHROME1":  # the lowest value is white
            low, high = _stored_span(ds)
            values = (low + high - values.astype(np.int64)).astype(values.dtype)
        if "ModalityLUTSequence" in ds:
            yield Picture(apply_modality_lut(values, ds)[..., None])
            continue
        slope, intercept = _rescaling(ds, number)
        if _is_plain(ds) and values.dtype == np.uint8:
            yield Picture(values[..., None])
        elif slope.is_integer() and intercept.is_integer():
            yield Picture((values.astype(np.int64) * int(slope) + int(intercept))[..., None], _stated(ds, number))
        else:
            yield Picture((values * slope + intercept)[..., None], _stated(ds, number))

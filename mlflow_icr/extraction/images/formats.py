"""The formats of image files, and which format a file has."""

from __future__ import annotations

from pathlib import PurePosixPath

from mlflow_icr.extraction.images import arrays, dicom, nifti, raster, tables, tiff
from mlflow_icr.extraction.images.sources import Format

RASTER = Format("images", (".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".gif"), raster.pictures)
TIFF = Format("images", (".tif", ".tiff"), tiff.pictures, tiff.header)
DICOM = Format("DICOM files", (".dcm", ".dicom", ".ima"), dicom.pictures, dicom.header)
NIFTI = Format("NIfTI volumes", (".nii", ".nii.gz"), nifti.pictures, nifti.header)
ARRAYS = Format("arrays", (".npy", ".npz"), arrays.pictures, arrays.header)
TABLES = Format("tables", (".parquet", ".arrow"), tables.pictures, tables.header)
FORMATS = (RASTER, TIFF, DICOM, NIFTI, ARRAYS, TABLES)

SUFFIXES = {suffix for kind in FORMATS for suffix in kind.suffixes}
RASTER_SUFFIXES = {*RASTER.suffixes, *TIFF.suffixes}  # formats that are usually called image files


def format_of(name: str) -> Format | None:
    """The format of a file by its name; None where the name is not that of a file of images."""
    lower = PurePosixPath(name).name.lower()
    return next((kind for kind in FORMATS if lower.endswith(kind.suffixes)), None)


def may_be_dicom(name: str) -> bool:
    """Whether a file may be DICOM by its name: it has no suffix, or the last number of an identifier as its suffix."""
    path = PurePosixPath(name)
    return path.name.upper() != "DICOMDIR" and path.suffix[1:].isdigit() == bool(path.suffix)


def is_dicom(first: bytes) -> bool:
    """Whether a file begins as DICOM files do."""
    return first[128:132] == b"DICM"

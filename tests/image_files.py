"""Image files as cameras and scanners write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_png(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path)


def write_tiff(path: Path, values: np.ndarray) -> None:
    import tifffile

    tifffile.imwrite(path, values)


def write_dicom(path: Path, values: np.ndarray, **attributes: object) -> None:
    """A file of stored values (H, W), (N, H, W) or (H, W, 3), as a scanner would write it."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    colour = values.ndim == 3 and values.shape[2] == 3
    if values.ndim == 3 and not colour:
        ds.NumberOfFrames = len(values)
    ds.Rows, ds.Columns = values.shape[:2] if colour or values.ndim == 2 else values.shape[1:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = 8 * values.dtype.itemsize
    ds.BitsStored, ds.HighBit = ds.BitsAllocated, ds.BitsAllocated - 1
    ds.PixelRepresentation = int(values.dtype.kind == "i")
    ds.PixelData = values.tobytes()
    for name, value in attributes.items():
        setattr(ds, name, value)
    pydicom.dcmwrite(path, ds)

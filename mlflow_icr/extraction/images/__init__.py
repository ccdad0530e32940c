"""Images from disk: folders, archives and arrays of them as tensors."""

from mlflow_icr.extraction.images.listing import SUFFIXES, ImageFiles, folder_labels, image_paths, is_archive, labels_of
from mlflow_icr.extraction.images.raster import (
    GREY_MODES,
    FolderFacts,
    ImageSet,
    as_eight_bit,
    content_hash,
    fit,
    folder_facts,
    load_folder,
    named,
    read_files,
    read_images,
    read_listed,
    stack_images,
    with_channels,
)

__all__ = [
    "GREY_MODES",
    "SUFFIXES",
    "FolderFacts",
    "ImageFiles",
    "ImageSet",
    "as_eight_bit",
    "content_hash",
    "fit",
    "folder_facts",
    "folder_labels",
    "image_paths",
    "is_archive",
    "labels_of",
    "load_folder",
    "named",
    "read_files",
    "read_images",
    "read_listed",
    "stack_images",
    "with_channels",
]

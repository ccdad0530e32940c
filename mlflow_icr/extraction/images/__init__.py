"""Images from disk: folders, archives and files of them as tensors."""

from mlflow_icr.extraction.images.formats import RASTER_SUFFIXES, SUFFIXES
from mlflow_icr.extraction.images.listing import (
    ImageFiles,
    Listing,
    folder_labels,
    holds_images,
    image_paths,
    is_archive,
    labels_of,
    named,
)
from mlflow_icr.extraction.images.picture import Picture, Size, fit, height_width, parse_size
from mlflow_icr.extraction.images.raster import GREY_MODES, check_background
from mlflow_icr.extraction.images.reading import Read, Reading, check_value_range, load_folder, read_items, read_whole, shapes
from mlflow_icr.extraction.images.sets import (
    FolderFacts,
    ImageSet,
    content_hash,
    folder_facts,
    read_files,
    read_images,
    stack_images,
    with_channels,
)
from mlflow_icr.extraction.images.store import Store

__all__ = [
    "GREY_MODES",
    "RASTER_SUFFIXES",
    "SUFFIXES",
    "FolderFacts",
    "ImageFiles",
    "ImageSet",
    "Listing",
    "Picture",
    "Read",
    "Reading",
    "Size",
    "Store",
    "check_background",
    "check_value_range",
    "content_hash",
    "fit",
    "folder_facts",
    "folder_labels",
    "height_width",
    "holds_images",
    "image_paths",
    "is_archive",
    "labels_of",
    "load_folder",
    "named",
    "parse_size",
    "read_files",
    "read_images",
    "read_items",
    "read_whole",
    "shapes",
    "stack_images",
    "with_channels",
]

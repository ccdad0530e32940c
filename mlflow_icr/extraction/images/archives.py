"""Zip archives of image files: the whole archive is checked first, then files are read one at a time."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path, PurePosixPath

FLAG_ENCRYPTED = 0x1
# The largest file: an uncompressed image of 16 bits and three channels of 13 000 x 13 000 pixels.
MOST_FILE_BYTES = 2**30
# DEFLATE packs zeros 1032 to 1. Image files are mostly compressed already, so an archive saves a few percent; uncompressed ones
# (bitmaps, TIFF, DICOM) shrink by a factor of at most 100, unless they are blank.
MOST_RATIO, UNSUSPICIOUS_BYTES = 200, 16 * 2**20


def check_member(info: zipfile.ZipInfo) -> None:
    """Raise ValueError for a suspicious file of an archive, before memory is taken for it."""
    parts = PurePosixPath(info.filename.replace("\\", "/")).parts
    reason = ""
    if not parts or ".." in parts or info.filename.startswith(("/", "\\")) or ":" in parts[0]:
        reason = "has a name that leads out of the archive"
    elif info.flag_bits & FLAG_ENCRYPTED:
        reason = "is encrypted"
    elif info.file_size > MOST_FILE_BYTES:
        reason = f"would take {info.file_size / 2**30:.1f} GiB; expected at most {MOST_FILE_BYTES / 2**30:.0f}"
    elif info.file_size > max(UNSUSPICIOUS_BYTES, MOST_RATIO * info.compress_size):
        ratio = info.file_size / max(1, info.compress_size)
        reason = f"is packed {ratio:.0f} to 1, as no image is; expected at most {MOST_RATIO}"
    if reason:
        raise ValueError(f"its file {info.filename!r} {reason}")


class ZipArchive:
    """A zip of files, by their names. Raises ValueError, one line, for a damaged or suspicious archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise ValueError(
                f"{str(path)!r} is not a whole zip archive ({error}); expected one, maybe it is truncated"
            ) from None
        self._sizes: dict[str, int] = {}
        for info in self._archive.infolist():
            if info.is_dir():
                continue
            try:
                check_member(info)
                if info.filename in self._sizes:
                    raise ValueError(f"its file {info.filename!r} is there twice")
            except ValueError as error:
                raise ValueError(f"{str(self.path)!r} is refused: {error}") from None
            self._sizes[info.filename] = info.file_size

    def names(self) -> list[str]:
        """The names of all files, with slashes."""
        return list(self._sizes)

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises ValueError for a wrong checksum, or for more bytes than declared."""
        try:
            with self._archive.open(name) as file:
                content = file.read(self._sizes[name])
                file.read(1)  # at its end the checksum is compared
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
            raise ValueError(f"damaged in the archive: {error}") from None
        return content

    def path_of(self, name: str) -> None:
        """None: the file is inside the archive only."""
        return

"""Paths of a command line: they hold from any working directory, and an output folder is checked before any work."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow_icr.extraction.files import check_outside
from trainers.data import EMBEDDED

PATHS = ("data", "init_from", "autoencoder", "encoder_weights")


def settled_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by flat name, with `~` expanded in paths, and existing paths made absolute.

    A run that is resumed from another folder then finds its data. Shells do not expand `~` in `--data=~/photos`.
    """
    settled = dict(values)
    for name in PATHS:
        text = settled.get(name)
        if isinstance(text, str) and text and text not in EMBEDDED:
            path = os.path.expanduser(text)
            settled[name] = os.path.abspath(path) if os.path.exists(path) else path
    return settled


def output_folder(text: str) -> Path:
    """The output folder of a command line; it need not exist. Raises ValueError for one that cannot be made or written in."""
    if not text.strip():
        raise ValueError(f"output_dir is {text!r}; expected a folder")
    folder = Path(text).expanduser()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"output_dir is {text!r}, but {str(existing)!r} is a file; expected a folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir is {text!r}; expected a folder that can be written, unlike {str(existing)!r} ({error.strerror})"
        ) from None
    return folder


def check_apart(output_dir: Path, data: str) -> None:
    """Raise ValueError for an output folder inside the data: the next run would read its pictures as images."""
    if data not in EMBEDDED:
        check_outside(output_dir, data)

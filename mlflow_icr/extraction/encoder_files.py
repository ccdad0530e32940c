"""The files of each encoder, their download into the cache on request, and how they are found there.

Only `fetch_encoder` opens a connection. Every other function here looks at the cache alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow_icr.extraction.downloads import Progress, download
from mlflow_icr.extraction.encoder_weights import WEIGHTS, Weights
from mlflow_icr.extraction.files import CACHE_VARIABLE, cache_folder, file_sha256, write_whole

FOLDER = "encoders"  # in the cache; it has a folder for each encoder
SUMS = "SHA256SUMS"  # written last, in the format of sha256sum: it marks a complete download
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class RemoteFile:
    """A file of an encoder: its name, its address, and its SHA-256, empty where no trustworthy one is known."""

    name: str
    url: str
    sha256: str = ""


def _one_file(weights: Weights) -> tuple[RemoteFile, ...]:
    return (RemoteFile(weights.source.rpartition("/")[2], weights.source, weights.sha256),)


def _of_the_hub(repository: str, commit: str) -> tuple[RemoteFile, ...]:
    """The two files of a transformers model, at one commit of its repository: a commit's content never changes."""
    names = ("config.json", "model.safetensors")
    return tuple(RemoteFile(name, f"{HUB}/{repository}/resolve/{commit}/{name}") for name in names)


# The weights are the last file of each.
ENCODER_FILES: dict[str, tuple[RemoteFile, ...]] = {
    "inception": _one_file(WEIGHTS["inception"]),
    "sscd": _one_file(WEIGHTS["sscd"]),
    "dinov2": _of_the_hub("facebook/dinov2-base", "f9e44c814b77203eaa57a6bdbbd535f21ede1415"),
    # OpenAI's weights as safetensors are a commit beside the main branch, which has a pickle.
    "clip": _of_the_hub("openai/clip-vit-base-patch32", "d15b5f29721ca72dac15f8526b284be910de18be"),
}


@dataclass(frozen=True)
class KeptEncoder:
    """An encoder in the cache: the path that `load_encoder` takes, and the SHA-256 of each file.

    `verified` is whether the weights have the published one.
    """

    name: str
    path: Path
    sums: Mapping[str, str]
    verified: bool


def encoder_folder(name: str) -> Path | None:
    """Where an encoder is kept in the cache; None where the cache is off."""
    folder = cache_folder()
    return None if folder is None else folder / FOLDER / name


def kept_encoder(name: str) -> KeptEncoder | None:
    """An encoder that was fetched completely earlier, or None. Its bytes are not read."""
    folder = encoder_folder(name)
    return None if folder is None or name not in ENCODER_FILES else _kept_in(folder, name)


def _sums_in(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file at the time it was fetched."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except OSError:
        return {}
    return {file: digest for digest, _, file in (line.partition("  ") for line in lines)}


def _kept_in(folder: Path, name: str) -> KeptEncoder | None:
    files, sums = ENCODER_FILES[name], _sums_in(folder)
    if any(file.name not in sums or not (folder / file.name).is_file() for file in files):
        return None
    path = folder if len(files) > 1 else folder / files[0].name
    verified = bool(files[-1].sha256) and sums[files[-1].name] == files[-1].sha256
    return KeptEncoder(name, path, sums, verified)


def fetch_encoder(
    name: str,
    *,
    sha256: str = "",
    progress: Callable[[RemoteFile], Progress] = lambda file: lambda received, total: None,
) -> KeptEncoder:
    """Download an encoder into the cache, unless it is already there, unchanged. An interrupted download resumes.

    `sha256` is the checksum that the weights must have; the default is the published one, or that of the first download where
    none is published. Raises ValueError for an unknown name, a cache that is off, or another checksum, and OSError for a server
    that does not answer or a full disk.
    """
    if name not in ENCODER_FILES:
        raise ValueError(f"encoder is {name!r}; expected one of {', '.join(ENCODER_FILES)}")
    folder = encoder_folder(name)
    if folder is None:
        raise ValueError(f"{CACHE_VARIABLE} is 'off', so that nothing is kept; expected a folder to keep the encoder in")
    files = ENCODER_FILES[name]
    expected = _expected_sums(name, folder, sha256)
    sums = {}
    for file in files:
        path, right = folder / file.name, expected[file.name]
        if path.is_file() and right and file_sha256(path) == right:
            sums[file.name] = right
            continue
        sums[file.name] = download(_mirrored(file.url), path, right, progress=progress(file))
    text = "".join(f"{digest}  {file}\n" for file, digest in sums.items())
    write_whole(folder / SUMS, lambda opened: opened.write(text.encode()))
    kept = _kept_in(folder, name)
    assert kept is not None
    return kept


def _expected_sums(name: str, folder: Path, sha256: str) -> dict[str, str]:
    """The SHA-256 that each file must have; empty where none is known."""
    files = ENCODER_FILES[name]
    requested, published = sha256.lower(), files[-1].sha256
    if requested and published and requested != published:
        raise ValueError(f"sha256 is {requested}, but the weights of {name} have {published}; expected that, or none")
    earlier = _sums_in(folder)
    expected = {file.name: file.sha256 or earlier.get(file.name, "") for file in files}
    if requested:
        expected[files[-1].name] = requested
    return expected


def _mirrored(url: str) -> str:
    """The address at the hub's mirror that HF_ENDPOINT names, as the hub's own client reads it."""
    mirror = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return mirror + url.removeprefix(HUB) if mirror and url.startswith(HUB) else url

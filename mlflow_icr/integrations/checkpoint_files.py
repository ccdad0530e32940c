"""Checkpoints on disk: which files belong to one, its training step, and whether it is complete.

Names, sizes and headers of safetensors files are read, no weights. The layouts are those of diffusers (its pipelines, networks
and training scripts), PEFT, kohya's sd-scripts, OneTrainer and ai-toolkit. All of these write directly to the final name, so a
file exists before it is complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

# In order of preference: one samples from the average.
NETWORKS = ("unet_ema", "unet", "transformer_ema", "transformer")
LORA = "pytorch_lora_weights.safetensors"  # diffusers' name
ONETRAINER_LORA = Path("lora") / "lora.safetensors"  # in its backups
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
LORA_KEY = re.compile(r"lora_(down|up|A|B)\b|\.lora\.(down|up)\.|hada_w1|lokr_w1")
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


class Kind(Enum):
    """The kind of weights in a checkpoint."""

    NETWORK = "a folder of diffusers' network"
    FILE = "a network in one safetensors file"
    LORA = "a LoRA in one safetensors file"
    PEFT = "a folder of a PEFT adapter"


@dataclass(frozen=True)
class Position:
    """The training step of a checkpoint, in optimizer steps (or what else the name counts) or in epochs."""

    count: int
    in_epochs: bool = False


@dataclass(frozen=True)
class CheckpointFiles:
    """One checkpoint: its folder or file, its weights, their kind, and its training step.

    `images_per_step` is the batch that its metadata name, if they name one.
    """

    path: Path
    weights: Path
    kind: Kind
    position: Position
    images_per_step: int | None = None


@dataclass(frozen=True)
class Entry:
    """A name in a folder of checkpoints: its checkpoint, or the reason why it has none; `unfinished`: this may change.

    `damaged`: some of its weights are missing. `state` is every file's name, size and time of change: while it changes, the
    checkpoint is being written.
    """

    path: Path
    state: tuple[tuple[str, int, int], ...]
    checkpoint: CheckpointFiles | None
    reason: str = ""
    unfinished: bool = False
    damaged: bool = False


@dataclass(frozen=True)
class Header:
    """The header of a complete safetensors file: the names of its tensors, and its metadata."""

    keys: tuple[str, ...]
    metadata: Mapping[str, str]


class UnfinishedError(Exception):
    """A file or folder that has not been written to the end, with the reason."""


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises UnfinishedError unless the file has as many bytes as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > LONGEST_HEADER or size < 8 + length:
            raise UnfinishedError(f"{path.name} ends within its header")
        try:
            entries = json.loads(file.read(length))
            metadata = entries.pop("__metadata__", {})
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UnfinishedError(f"{path.name} has no header that can be read") from None
    if size != 8 + length + end:
        raise UnfinishedError(f"{path.name} has {size} of {8 + length + end} bytes")
    return Header(tuple(entries), metadata)


def entries_of(folder: Path) -> list[Entry]:
    """The entries of a folder, sorted by name; hidden files, and files other than safetensors, are skipped."""
    entries = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not (path.is_dir() or path.suffix == ".safetensors"):
            continue
        with suppress(FileNotFoundError):  # trainers remove old checkpoints
            entry = _entry(path)
            if entry is not None:
                entries.append(entry)
    return entries


def _entry(path: Path) -> Entry | None:
    """The entry of a name; None for a folder that has neither a number in its name nor weights."""
    state = _state(path)
    position = position_in_name(path.stem if path.is_file() else path.name)
    try:
        if path.is_file():
            return Entry(path, state, *_single(path, position))
        contents = _weights_in(path)
        if contents is None:
            reason = f"it holds neither {', '.join(NETWORKS)} nor {LORA}"
            return None if position is None else Entry(path, state, None, reason, unfinished=True)
        weights, kind, header = contents
    except UnfinishedError as error:
        return Entry(path, state, None, str(error), unfinished=True, damaged=True)
    where = _position_in_metadata(header.metadata if header is not None else {}) or position
    if where is None:
        return None
    return Entry(path, state, CheckpointFiles(path, weights, kind, where))


def _state(path: Path) -> tuple[tuple[str, int, int], ...]:
    files = [path] if path.is_file() else sorted(inner for inner in path.rglob("*") if inner.is_file())
    state = []
    for file in files:
        with suppress(FileNotFoundError):
            status = file.stat()
            state.append((str(file.relative_to(path)), status.st_size, status.st_mtime_ns))
    return tuple(state)


def _single(path: Path, position: Position | None) -> tuple[CheckpointFiles | None, str]:
    header = read_header(path)
    kind = Kind.LORA if any(LORA_KEY.search(key) for key in header.keys) else Kind.FILE
    where = _position_in_metadata(header.metadata) or position
    if where is None:
        return None, "neither its name nor its metadata say at which step it was saved"
    return CheckpointFiles(path, path, kind, where, _images_per_step(header.metadata)), ""


def _weights_in(folder: Path) -> tuple[Path, Kind, Header | None] | None:
    """The weights in a folder, their kind, and the header of a LoRA. Raises UnfinishedError for an incomplete checkpoint."""
    for name in NETWORKS:
        if (folder / name).is_dir():
            _check_network(folder / name)
            return folder / name, Kind.NETWORK, None
    if (folder / LORA).is_file():
        return folder / LORA, Kind.LORA, read_header(folder / LORA)
    if (folder / ONETRAINER_LORA).is_file():
        return folder / ONETRAINER_LORA, Kind.LORA, read_header(folder / ONETRAINER_LORA)
    if (folder / PEFT_WEIGHTS).is_file() or (folder / PEFT_CONFIG).is_file():
        if not ((folder / PEFT_WEIGHTS).is_file() and (folder / PEFT_CONFIG).is_file()):
            raise UnfinishedError(f"it does not hold both {PEFT_WEIGHTS} and {PEFT_CONFIG}")
        return folder, Kind.PEFT, read_header(folder / PEFT_WEIGHTS)
    if "_class_name" in _json_in(folder / "config.json"):
        _check_network(folder)
        return folder, Kind.NETWORK, None
    return None


def _json_in(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_network(folder: Path) -> None:
    """Raise UnfinishedError unless a network's folder holds its config and whole weights, all shards that its index names."""
    if not _json_in(folder / "config.json"):
        raise UnfinishedError(f"{folder.name} has no config.json that can be read")
    files = sorted(folder.glob("*.safetensors"))
    named = set()
    for index in folder.glob("*.safetensors.index.json"):
        weight_map = _json_in(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UnfinishedError(f"{folder.name} has no {index.name} that can be read")
        named |= set(map(str, weight_map.values()))
    missing = sorted(named - {file.name for file in files})
    if missing:
        raise UnfinishedError(f"{folder.name} has no {missing[0]}")
    if not named and any(SHARD.search(file.name) for file in files):
        raise UnfinishedError(f"{folder.name} has shards, and no index of them")
    if not files:
        pickles = " (it has pickles, which are not read)" if any(folder.glob("*.bin")) else ""
        raise UnfinishedError(f"{folder.name} has no weights as safetensors{pickles}")
    for file in files:
        read_header(file)


# Units by the end of a name. kohya's trainers count epochs, with six digits after a hyphen.
NAMES = (
    (re.compile(r"(?:^|[^a-z])(?:global_?)?steps?[-_=]?(\d+)$", re.IGNORECASE), False),  # name-step00000500, step=500
    (re.compile(r"-(?:save|backup)-(\d+)-\d+-\d+$"), False),  # OneTrainer: steps, epochs, steps of the epoch
    (re.compile(r"^checkpoint-(\d+)$"), False),  # diffusers
    (re.compile(r"-(0\d{5})$"), True),  # kohya: name-000003
    (re.compile(r"(?:^|[^a-z])epochs?[-_=]?(\d+)$", re.IGNORECASE), True),
    (re.compile(r"(\d+)$"), False),  # ai-toolkit: name_000000500; the trainers here: 000000131072
)


def position_in_name(name: str) -> Position | None:
    """The training step in the name of a folder, or of a file without its suffix; None if there is none."""
    for pattern, in_epochs in NAMES:
        match = pattern.search(name)
        if match is not None:
            return Position(int(match[1]), in_epochs)
    return None


def _position_in_metadata(metadata: Mapping[str, str]) -> Position | None:
    """The optimizer steps that kohya's trainers (`ss_steps`) and ai-toolkit (`training_info`) write beside the weights."""
    with suppress(KeyError, ValueError, TypeError):
        return Position(int(metadata["ss_steps"]))
    with suppress(KeyError, ValueError, TypeError):
        return Position(int(json.loads(metadata["training_info"])["step"]))
    return None


def _images_per_step(metadata: Mapping[str, str]) -> int | None:
    with suppress(KeyError, ValueError, TypeError):
        return max(1, int(metadata["ss_total_batch_size"]))
    return None


def changed_at(checkpoint: CheckpointFiles) -> float:
    """When the newest file of the weights was written, in seconds. Raises FileNotFoundError if they were removed."""
    moments = [path.stat().st_mtime for path in _files(checkpoint.weights)]
    if not moments:
        raise FileNotFoundError(checkpoint.weights)
    return max(moments)


def _files(path: Path) -> Iterator[Path]:
    yield from [path] if path.is_file() else (inner for inner in path.rglob("*") if inner.is_file())

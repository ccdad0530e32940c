"""One folder of TensorBoard event files, read as TensorBoard would show it."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_icr.tracking.tensorboard.event_file import events, is_event_file

Text = tuple[int, int, str]
# Steps, wall times in ms and values: 24 bytes a point, where a tuple would take 150.
Columns = tuple["array[Any]", "array[Any]", "array[Any]"]


@dataclass
class Folder:
    """Scalars per tag as (N,) arrays of steps, wall times in ms and values; where the images are; texts; hparams.

    A restarted writer names the step that it restarts from; earlier points from that step on are left out, as TensorBoard
    does. `others` counts values of kinds that MLflow does not have, `torn` names files with a damaged record, `span` is
    the first and the last wall time in ms, `identities` are the files'.
    """

    path: Path
    identities: list[str] = field(default_factory=list)
    scalars: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=dict)
    images: list[tuple[str, int, int]] = field(default_factory=list)
    texts: dict[str, list[Text]] = field(default_factory=dict)
    hparams: dict[str, bool | float | str] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    failed: bool = False
    ended: bool = False
    span: tuple[int, int] = (0, 0)
    torn: list[str] = field(default_factory=list)


def event_folders(logdir: Path) -> Iterator[Path]:
    """Every folder with event files at or below a path, in order."""
    for folder in sorted([logdir, *(path for path in logdir.rglob("*") if path.is_dir() and not path.is_symlink())]):
        if event_files(folder):
            yield folder


def event_files(folder: Path) -> list[Path]:
    """The event files of a folder, in the order that TensorBoard reads them in."""
    return sorted(path for path in folder.iterdir() if is_event_file(path.name) and path.is_file())


def identities(folder: Path) -> list[str]:
    """An identity of each event file, the same wherever the folder is, (N,) hexadecimal; empty without the folder."""
    digests = (_identity(path) for path in event_files(folder)) if folder.is_dir() else ()
    return [identity for identity in digests if identity]


def _identity(path: Path) -> str:
    """A digest of a file's name and of its first record with a wall time; empty where it has none yet."""
    for event in islice(events(path), 2):  # the first one of an export here has no time
        if event.wall_time:
            return hashlib.sha256(path.name.encode() + event.SerializeToString()).hexdigest()[:12]
    return ""


class _Reader:
    """Sorts values by their kind; the first value with metadata sets its tag's kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kinds: dict[str, tuple[str, bytes]] = {}
        self.torn: list[str] = []

    def __iter__(self) -> Iterator[tuple[Any, str, str, Any]]:
        """(event, kind, tag, content) of all files; kind "restart" for a restarted writer."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        for path in event_files(self.folder):
            for event in events(path, partial(self._torn, path.name)):
                if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                    yield event, "restart", "", None
                for value in event.summary.value:
                    kind, content = self._value(value)
                    yield event, kind, value.tag, content

    def _torn(self, name: str, offset: int) -> None:
        self.torn.append(f"{name} from byte {offset} on")

    def _value(self, value: Any) -> tuple[str, Any]:
        which = value.WhichOneof("value")
        plugin = value.metadata.plugin_data
        if plugin.plugin_name:
            self._kinds.setdefault(value.tag, (plugin.plugin_name, plugin.content))
        if which == "simple_value":
            return "scalars", value.simple_value
        if which == "image":
            return "images", [value.image.encoded_image_string]
        kind, content = self._kinds.get(value.tag, ("tensors", b""))
        if kind == "hparams":  # all of it is in the metadata, with or without a tensor
            return kind, content
        if which != "tensor":
            return {"histo": "histograms"}.get(which, which or "empty"), None
        if kind in ("scalars", "images", "text"):
            return kind, _tensor(kind, value.tensor)
        return kind, None


def _tensor(kind: str, proto: Any) -> Any:
    from tensorboard.util import tensor_util

    if kind == "images":  # width, height, then one string for each image
        return list(proto.string_val)[2:]
    array = tensor_util.make_ndarray(proto)
    if kind == "scalars":
        return float(array.reshape(-1)[0]) if array.size else float("nan")
    return "\n\n".join(part.decode(errors="replace") for part in array.reshape(-1))


def _milliseconds(event: Any) -> int:
    return round(event.wall_time * 1000)


def read_folder(path: Path) -> Folder:
    """Read a folder's event files; images are only listed, see `read_images`."""
    folder = Folder(path, identities(path))
    points: dict[str, Columns] = {}
    first, last = None, 0
    reader = _Reader(path)
    for event, kind, tag, content in reader:
        step, moment = int(event.step), _milliseconds(event)
        if kind == "restart":
            _forget(points, folder, step)
            continue
        if kind == "scalars":
            columns = points.setdefault(tag, (array("q"), array("q"), array("d")))
            columns[0].append(step)
            columns[1].append(moment)
            columns[2].append(content)
        elif kind == "images":
            folder.images += [(name, step, moment) for name, _ in named(tag, content)]
        elif kind == "text":
            folder.texts.setdefault(tag.removesuffix("/text_summary"), []).append((step, moment, content))
        elif kind == "hparams":
            _hparams(folder, content)
        else:
            folder.others[kind] += 1
        if moment and kind != "hparams":
            first, last = min(moment, first or moment), max(moment, last)
    folder.span, folder.torn = (first or 0, last), reader.torn
    for tag, (steps, moments, values) in points.items():
        folder.scalars[tag] = (np.array(steps), np.array(moments), np.array(values))
    return folder


def _forget(points: dict[str, Columns], folder: Folder, step: int) -> None:
    """Drop the points and images of a step and later ones."""
    for tag in list(points):
        kept = [index for index, earlier in enumerate(points[tag][0]) if earlier < step]
        if not kept:
            del points[tag]
        elif len(kept) < len(points[tag][0]):
            for column in points[tag]:
                column[:] = array(column.typecode, (column[index] for index in kept))
    folder.images = [image for image in folder.images if image[1] < step]


def named(tag: str, images: list[bytes]) -> list[tuple[str, bytes]]:
    """The images of one event under names of their own."""
    return [(tag if len(images) == 1 else f"{tag}/{index}", image) for index, image in enumerate(images)]


def read_images(path: Path) -> Iterator[tuple[str, int, int, bytes]]:
    """(name, step, wall time in ms, encoded image) of a folder, one after the other."""
    for event, kind, tag, content in _Reader(path):
        if kind == "images":
            for name, image in named(tag, content):
                yield name, int(event.step), _milliseconds(event), image


def _hparams(folder: Folder, content: bytes) -> None:
    from tensorboard.plugins.hparams import api_pb2
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    data = HParamsPluginData.FromString(content)
    for key, value in data.session_start_info.hparams.items():
        which = value.WhichOneof("kind")
        if which in ("bool_value", "number_value", "string_value"):
            folder.hparams[key] = getattr(value, which)
    if data.HasField("session_end_info"):
        folder.ended = True
        folder.failed = data.session_end_info.status == api_pb2.STATUS_FAILURE

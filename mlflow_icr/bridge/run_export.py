"""Export of one MLflow run to one folder of event files: whole histories, each point once, also after an interrupted export."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mlflow_icr.extraction.files import write_whole
from mlflow_icr.monitoring.summary import SUMMARY_KEYS
from mlflow_icr.tracking.mlflow import store
from mlflow_icr.tracking.tensorboard import event_file
from mlflow_icr.tracking.tensorboard.answer import answer_keys, summary_tag
from mlflow_icr.tracking.tensorboard.event_file import EventFile
from mlflow_icr.tracking.tensorboard.hparams import RENAMED, description

STATE = ".mlflow-export.json"
STATE_VERSION = 2
# In the order that TensorBoard reads them: the description is replaced when it changes, the data is appended to.
DESCRIPTION = "events.out.tfevents.mlflow.0.description"
DATA = "events.out.tfevents.mlflow.1.data"
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")
SHOWN_AS_THEY_ARE = {"PNG", "JPEG", "GIF"}
# As mlflow.log_image names its files; % was the separator before +, and # stood for / before ~.
STEPPED = re.compile(r"images/(?P<key>.+)(?P<s>[+%])step(?P=s)(?P<step>-?\d+)(?P=s)timestamp(?P=s)(?P<ms>\d+)(?P=s)[^+%]+\.png")
PREVIEW = re.compile(r"images/.+[+%]step[+%]-?\d+[+%]timestamp[+%].+[+%]compressed\.webp")
# A protocol buffer ends at 2 GB, and TensorBoard holds every image in memory.
LARGEST_IMAGE = 64 << 20
COMMIT_BYTES = 8 << 20
LOOK_AT_ALL_SECONDS = 60.0  # between two looks, while a run goes on, at folders without pictures and into known pictures
Echo = Callable[[str], None]


@dataclass
class State:
    """What a run's folder holds: the committed size, per metric the number of points and the last one, image versions.

    A version of an image is its size in bytes and the digest of its content.
    """

    run_id: str
    size: int = 0
    points: dict[str, tuple[int, str]] = field(default_factory=dict)
    images: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    described: str = ""

    @classmethod
    def load(cls, folder: Path, run_id: str) -> State:
        """A folder's state; an empty one, which starts the export again, if the state does not match the files."""
        try:
            content = json.loads((folder / STATE).read_text(encoding="utf-8"))
            if content.pop("version") != STATE_VERSION or content["run_id"] != run_id:
                return cls(run_id)
            state = cls(**content)
            if state.size > (folder / DATA).stat().st_size:
                return cls(run_id)
            if not (folder / DESCRIPTION).exists():
                state.described = ""
            return state
        except (OSError, ValueError, TypeError, KeyError):
            return cls(run_id)

    def save(self, folder: Path) -> None:
        """Write the state, whole or not at all."""
        content = json.dumps({"version": STATE_VERSION, **asdict(self)})
        write_whole(folder / STATE, lambda file: file.write(content.encode()))


def owner(folder: Path) -> str | None:
    """The id of the run that a folder was exported from; None where that is unknown."""
    try:
        return str(json.loads((folder / STATE).read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


@dataclass(frozen=True)
class Exported:
    """What one export of a run added to its folder."""

    run_id: str
    folder: Path
    new_points: int
    new_images: int
    status: str


def _mark(point: Any) -> str:
    """A point as text that no other point of the same metric has."""
    return f"{point.timestamp} {point.step} {point.value!r}"


@dataclass
class Looked:
    """When all artifacts of a run were last listed, and which folders had no picture then, at or below them."""

    at: float = -LOOK_AT_ALL_SECONDS
    without: set[str] = field(default_factory=set)


class RunExport:
    """Exports one run into one folder, under its lock; `looked` is the listing of an earlier export in this process."""

    def __init__(self, client: Any, run: Any, folder: Path, group: str, echo: Echo, looked: Looked) -> None:
        self.client, self.run, self.folder, self.echo, self.looked = client, run, folder, echo, looked
        self.group = group
        self.run_id: str = run.info.run_id
        self.tags: dict[str, str] = run.data.tags

    def __call__(self) -> Exported:
        """Append what is new. Raises ValueError when another process exports there, store.StoreError when the store fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.new_points = self.new_images = 0
        with EventFile(self.folder / DATA) as self.file:
            self.state = State.load(self.folder, self.run_id)  # under the lock
            self.file.start(self.state.size)
            if self._describe() or self.file.waiting:
                self._commit()
            for key in sorted(self.run.data.metrics):
                self._metric(key)
            self._images()
        return Exported(self.run_id, self.folder, self.new_points, self.new_images, self.run.info.status)

    def _commit(self) -> None:
        self.state.size = self.file.commit()
        self.state.save(self.folder)

    def _describe(self) -> bool:
        """Replace the description when it has changed."""
        event = description(self.run.info, self.run.data.params, self.tags, self.group)
        digest = hashlib.sha256(event).hexdigest()
        if digest == self.state.described:
            return False
        write_whole(self.folder / DESCRIPTION, lambda file: _write_description(file, event))
        self.state.described = digest
        return True

    def _tag(self, key: str) -> str:
        return self.tags.get(RENAMED + key, summary_tag(key) if key in SUMMARY_KEYS else key)

    def _points(self, key: str, points: Iterable[tuple[int, float, float]]) -> None:
        """Append points (step, time in ms, value) under the metric's tag, and in the group `Answer` if it is shown there."""
        answer = answer_keys(self.run.data.metrics).get(key)
        tags = [self._tag(key), *([answer] if answer else [])]
        for step, moment, value in points:
            for tag in tags:
                self.file.scalar(tag, step, moment / 1000, value)

    def _metric(self, key: str) -> None:
        """Append a metric's points that are not there yet.

        Each page starts with the last point that was written. If the store has another one in that place, a point with an
        earlier time was logged since, and the whole series is compared.
        """
        more = True
        while more:
            count, last = self.state.points.get(key, (0, ""))
            page, more = store.metric_page(self.client, self.run_id, key, max(count - 1, 0))
            if count:
                if not page or _mark(page[0]) != last:
                    self._compare(key)
                    return
                page = page[1:]
            if page:
                self._points(key, ((point.step, point.timestamp, point.value) for point in page))
                self._wrote(key, len(page), count + len(page), _mark(page[-1]))

    def _wrote(self, key: str, new: int, total: int, last: str) -> None:
        self.state.points[key] = (total, last)
        self._commit()
        self.new_points += new

    def _compare(self, key: str) -> None:
        """Append the points of a metric that the file does not have, by comparing all points of both."""
        steps, times, values, total, last, more = [], [], [], 0, "", True
        while more:
            page, more = store.metric_page(self.client, self.run_id, key, max(total - 1, 0))
            if total and (not page or _mark(page[0]) != last):
                return  # the series is changing as it is read: the next export compares again
            page = page[1:] if total else page
            steps.append(np.array([point.step for point in page], dtype=np.int64))
            times.append(np.array([point.timestamp for point in page], dtype=np.int64))
            values.append(np.array([point.value for point in page], dtype=np.float64))
            total += len(page)
            last = _mark(page[-1]) if page else last
        step, moment, value = (np.concatenate(part) for part in (steps, times, values))
        written = event_file.scalars(self.folder / DATA, self._tag(key))
        new = event_file.unseen(event_file.as_points(step, moment, event_file.float32_bits(value)), written)
        self._points(key, ((int(step[i]), float(moment[i]), float(value[i])) for i in new))
        self._wrote(key, len(new), total, last)

    def _images(self) -> None:
        """Append the images that the file does not have; an image logged again under its name is a new version."""
        ended = self.run.info.status in store.ENDED
        look_at_all = ended or time.monotonic() - self.looked.at >= LOOK_AT_ALL_SECONDS
        new = []
        for path, size in self._listed(look_at_all):
            versions = self.state.images.get(path, [])
            # What a store lists has no time and no digest: a picture of the same size has to be read. A stepped one has a
            # name of its own.
            if not versions or versions[-1][0] != size or (look_at_all and not STEPPED.fullmatch(path)):
                new.append((*self._place(path, len(versions)), path, size))
        with tempfile.TemporaryDirectory() as temporary:
            for tag, moment, step, path, size in sorted(new):
                self._image(tag, moment, step, path, size, Path(temporary))
                if self.file.waiting > COMMIT_BYTES:
                    self._commit()
        if self.file.waiting:
            self._commit()

    def _listed(self, look_at_all: bool) -> list[tuple[str, int]]:
        """Paths and sizes of pictures among the artifacts; without `look_at_all`, folders that had none are skipped."""
        skip = set() if look_at_all else self.looked.without
        try:
            files = list(store.files(self.client, self.run_id, skip=skip))
        except store.StoreError as error:
            self._unless_gone(error)
            self.echo(f"images of run {self.run_id} are left out ({error}); the next export tries again")
            return []
        pictures = [(file.path, int(file.file_size or 0)) for file in files if file.path.lower().endswith(IMAGES)]
        with_pictures = {parent for path, _ in pictures for parent in PurePosixPath(path).parents}
        without = {str(parent) for file in files for parent in PurePosixPath(file.path).parents if parent not in with_pictures}
        self.looked.without = skip | without
        if look_at_all:
            self.looked.at = time.monotonic()
        return [(path, size) for path, size in pictures if not PREVIEW.fullmatch(path)]

    def _unless_gone(self, error: store.StoreError) -> None:
        """Raise an error of the artifact store if the tracking store does not answer either."""
        if not store.is_alive(self.client, self.run_id):
            raise error

    def _place(self, path: str, version: int) -> tuple[str, int, int]:
        """Tag, time in ms and step of an image artifact."""
        stepped = STEPPED.fullmatch(path)
        if stepped:
            key, moment, step = re.sub("[~#]", "/", stepped["key"]), int(stepped["ms"]), int(stepped["step"])
        else:  # the store does not say when a file was written
            key, moment, step = path, int(self.run.info.end_time or self.run.info.start_time or 0), version
        tag = self._tag(key)
        # TensorBoard shows one kind of thing under one tag.
        return (f"images/{tag}" if key in self.run.data.metrics else tag), moment, step

    def _image(self, tag: str, moment: int, step: int, path: str, size: int, temporary: Path) -> None:
        """Append an image, unless its content is that of its last version."""
        from PIL import Image

        if size > LARGEST_IMAGE:
            self.echo(f"{path} of run {self.run_id} is left out: {size >> 20} MiB, expected at most {LARGEST_IMAGE >> 20}")
            return
        try:
            content = store.download(self.client, self.run_id, path, temporary)
            version = (size, hashlib.sha256(content).hexdigest()[:16])
            versions = self.state.images.get(path, [])
            if versions and versions[-1][1] == version[1]:
                return
            with Image.open(io.BytesIO(content)) as image:
                if image.format not in SHOWN_AS_THEY_ARE:
                    converted = io.BytesIO()
                    image.convert("RGBA").save(converted, format="png")
                    content = converted.getvalue()
                width, height = image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            if isinstance(error, store.StoreError):
                self._unless_gone(error)
            self.echo(f"{path} of run {self.run_id} is left out: {type(error).__name__}; the next export tries it again")
            return
        self.file.image(tag, step, moment / 1000, content, width, height)
        self.state.images[path] = [*versions, version]
        self.new_images += 1


def _write_description(file: Any, event: bytes) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    records = RecordWriter(file)
    records.write(Event(wall_time=0.0, file_version=event_file.FILE_VERSION).SerializeToString())
    records.write(event)

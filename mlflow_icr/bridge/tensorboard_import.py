"""TensorBoard event files as MLflow runs: one run for each folder, and only what its run does not have yet."""

from __future__ import annotations

import hashlib
import io
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_icr.bridge.event_folder import Folder, Text, event_folders, identities, read_folder, read_images
from mlflow_icr.bridge.run_export import STEPPED
from mlflow_icr.monitoring.evidence import EXCESS
from mlflow_icr.tracking.keys import LONGEST_PARAM, LONGEST_TAG, METRICS_PER_CALL, TEXTS_PER_CALL
from mlflow_icr.tracking.mlflow import store
from mlflow_icr.tracking.tensorboard.answer import ANSWERS, VIEW_EXCESS, key_of
from mlflow_icr.tracking.tensorboard.custom_scalars import COPIES, ICR, OVERLAY
from mlflow_icr.tracking.tensorboard.event_file import as_points, unseen
from mlflow_icr.tracking.tensorboard.hparams import RENAMED, SYSTEM, TAG_PREFIX, parameter_text

SOURCE = "tensorboard.source"  # a run's tag: the last path of its event files
FILES = "tensorboard.files"  # and the identities of these files, which a move does not change
MOST_FILES = 600  # as many as a tag has room for
TEXTS = "tensorboard.texts"
TEXT_PREFIX = "tensorboard.text."
# MLflow allows 250 characters, a file system 255 for a file's name; log_image adds some 90 to a key for that.
LONGEST_KEY = 150
# What MLflow's metrics, parameters, tags and images all allow, on every system.
FORBIDDEN = re.compile(r"[^A-Za-z0-9_./ -]")
Echo = Callable[[str], None]


@dataclass(frozen=True)
class Imported:
    """What one import of a folder added to its run."""

    run_id: str
    run_name: str
    folder: Path
    new_points: int
    new_images: int


class Names:
    """MLflow's name for each tag of a run: the same every time, and never one name for two tags.

    `tags` are the run's: a name that had to be changed is remembered there, under RENAMED. `keys` are the names it has.
    """

    def __init__(self, tags: Mapping[str, str], keys: Iterable[str]) -> None:
        changed = {key.removeprefix(RENAMED): tag for key, tag in tags.items() if key.startswith(RENAMED)}
        self._taken = {key: key for key in keys} | changed
        self._keys = {tag: key for key, tag in self._taken.items()}
        self.new: dict[str, str] = {}

    def __call__(self, tag: str) -> str:
        """The key for a tag."""
        if tag in self._keys:
            return self._keys[tag]
        key = posixpath.normpath(FORBIDDEN.sub("_", tag)).lstrip("/")
        while key.startswith("../"):
            key = key[3:]
        key = "unnamed" if key in ("", ".", "..") else key
        if len(key) > LONGEST_KEY or self._taken.get(key, tag) != tag:
            key = f"{key[: LONGEST_KEY - 9]}-{hashlib.sha256(tag.encode()).hexdigest()[:8]}"
        if key != tag:
            self.new[key] = tag
        self._taken[key] = tag
        self._keys[tag] = key
        return key

    def assign(self, tags: Iterable[str]) -> None:
        """Assign a name to each tag, first to tags that can keep theirs."""
        for tag in sorted(tags, key=lambda tag: (bool(FORBIDDEN.search(tag)), tag)):
            self(tag)


class _FolderImport:
    """Imports one folder into one run."""

    def __init__(self, client: Any, experiment: str, folder: Folder, name: str, run: Any, echo: Echo) -> None:
        self.client, self.folder, self.name, self.echo = client, folder, name, echo
        self.is_new = run is None
        if run is None:
            tags = {SOURCE: str(folder.path), FILES: " ".join(folder.identities[:MOST_FILES])}
            with store.answers():
                run = client.create_run(experiment, start_time=folder.span[0], run_name=name, tags=tags)
        self.run = run
        self.run_id: str = run.info.run_id
        self.names = Names(run.data.tags, run.data.metrics)

    def __call__(self) -> Imported:
        folder = self.folder
        if {ICR, COPIES[0]} <= folder.scalars.keys():  # the sink's own, which follows from these two
            for tag in OVERLAY:
                folder.scalars.pop(tag, None)
        for tag, keys in {**ANSWERS, VIEW_EXCESS: (EXCESS,)}.items():
            if not folder.scalars.keys().isdisjoint(keys):
                folder.scalars.pop(tag, None)
        for tag in [tag for tag in folder.scalars if key_of(tag) not in folder.scalars]:
            folder.scalars[key_of(tag)] = folder.scalars.pop(tag)
        self.names.assign({*folder.scalars, *folder.texts, *folder.hparams, *(name for name, _, _ in folder.images)})
        self._hparams()
        self._tags({SOURCE: str(folder.path), FILES: " ".join(folder.identities[:MOST_FILES])})
        self._tags({RENAMED + key: tag for key, tag in self.names.new.items()})
        points = sum(self._metric(tag, *columns) for tag, columns in folder.scalars.items())
        images = self._images() if folder.images else 0
        self._texts()
        self._end()
        for place in folder.torn:
            self.echo(f"{self.name}: {place} is no record; what stands before it is in, and a repeat tries the rest")
        if folder.others:
            kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(folder.others.items()))
            self.echo(f"{self.name}: MLflow has no place for {kinds}; left out")
        return Imported(self.run_id, self.name, self.folder.path, points, images)

    def _metric(self, tag: str, steps: np.ndarray, moments: np.ndarray, values: np.ndarray) -> int:
        """Log the points of a tag that the run does not have; a point written twice is one. Returns how many."""
        from mlflow.entities import Metric

        key = self.names(tag)
        points = as_points(steps, moments, store.float64_bits(values))
        _, once = np.unique(points, axis=0, return_index=True)
        once = np.sort(once)
        if not self.is_new and key in self.run.data.metrics:
            once = once[unseen(points[once], self._stored(key))]
        for start in range(0, len(once), METRICS_PER_CALL):
            batch = [
                Metric(key, float(values[i]), int(moments[i]), int(steps[i])) for i in once[start : start + METRICS_PER_CALL]
            ]
            with store.answers():
                self.client.log_batch(self.run_id, metrics=batch)
        return len(once)

    def _stored(self, key: str) -> np.ndarray:
        """All points of a metric that the run has, (N, 3)."""
        pages, count, more = [np.zeros((0, 3), np.int64)], 0, True
        while more:
            page, more = store.metric_page(self.client, self.run_id, key, count)
            count += len(page)
            bits = store.float64_bits([point.value for point in page])
            pages.append(as_points([point.step for point in page], [point.timestamp for point in page], bits))
        return np.concatenate(pages)

    def _hparams(self) -> None:
        """Log hparams that the run does not have as parameters, those of an exported run's tags as tags."""
        from mlflow.entities import Param

        logged = self.run.data.params
        params, tags = [], {}
        for name, value in self.folder.hparams.items():
            text = parameter_text(value)
            key = self.names(name)
            if key.startswith(TAG_PREFIX):
                if not key.removeprefix(TAG_PREFIX).startswith(SYSTEM):  # those would say something else of this run
                    tags[key.removeprefix(TAG_PREFIX)] = text
                continue
            if key not in logged:
                params.append(Param(key, text[:LONGEST_PARAM]))
            elif logged[key] != text[:LONGEST_PARAM]:
                self.echo(f"{self.name}: hparam {name} is now {text!r}; the run keeps {logged[key]!r}")
            if len(text) > LONGEST_PARAM:
                self.echo(f"{self.name}: hparam {name} is cut at {LONGEST_PARAM} characters")
        for start in range(0, len(params), TEXTS_PER_CALL):
            with store.answers():
                self.client.log_batch(self.run_id, params=params[start : start + TEXTS_PER_CALL])
        self._tags(tags)

    def _tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        logged = self.run.data.tags
        new = [RunTag(key, text[:LONGEST_TAG]) for key, text in tags.items() if logged.get(key) != text[:LONGEST_TAG]]
        for start in range(0, len(new), TEXTS_PER_CALL):
            with store.answers():
                self.client.log_batch(self.run_id, tags=new[start : start + TEXTS_PER_CALL])

    def _images(self) -> int:
        """Log the images that the run does not have, by name, step and time. Returns how many."""
        wanted = Counter((self.names(name), step, moment) for name, step, moment in self.folder.images)
        if not self.is_new:
            wanted -= self._stored_images()
        count = 0
        for name, step, moment, encoded in read_images(self.folder.path) if wanted else ():
            place = (self.names(name), step, moment)
            if wanted[place] > 0:
                wanted[place] -= 1
                count += self._image(*place, encoded)
        return count

    def _stored_images(self) -> Counter[tuple[str, int, int]]:
        matches = (STEPPED.fullmatch(file.path) for file in store.files(self.client, self.run_id, "images"))
        return Counter((re.sub("[~#]", "/", m["key"]), int(m["step"]), int(m["ms"])) for m in matches if m)

    def _image(self, key: str, step: int, moment: int, encoded: bytes) -> bool:
        from PIL import Image

        try:
            image: Image.Image = Image.open(io.BytesIO(encoded))
            image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            self.echo(f"{self.name}: image {key} at step {step} is left out: {type(error).__name__}")
            return False
        if getattr(image, "n_frames", 1) > 1:
            self.echo(f"{self.name}: of the animation {key} at step {step}, the first picture")
        if image.mode not in ("L", "RGB", "RGBA"):  # log_image's preview cannot be of every kind
            image = image.convert("RGBA" if "A" in image.mode or "transparency" in image.info else "RGB")
        with store.answers():
            self.client.log_image(self.run_id, image, key=key, step=step, timestamp=moment, synchronous=True)
        return True

    def _texts(self) -> None:
        """Set each text's newest version as a tag, and all of its versions as one file."""
        texts = {self.names(tag): sorted(versions) for tag, versions in self.folder.texts.items()}
        digest = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()
        if not texts or self.run.data.tags.get(TEXTS) == digest:
            return
        for key, versions in texts.items():
            with store.answers():
                self.client.log_text(self.run_id, _markdown(versions), f"text/{re.sub('[/ ]', '_', key)}.md")
        # Last: a file that could not be written is tried again.
        self._tags({TEXT_PREFIX + key: versions[-1][2] for key, versions in texts.items()} | {TEXTS: digest})

    def _end(self) -> None:
        """Set the run's status and its end, the time of the last event."""
        status = "FAILED" if self.folder.failed else "FINISHED"
        if self.run.info.status != status or self.run.info.end_time != self.folder.span[1]:
            with store.answers():
                store.end_run(self.client, self.run_id, status, self.folder.span[1])


def _markdown(versions: list[Text]) -> str:
    return "\n\n".join(f"## Step {step}\n\n{text}" for step, _, text in versions) + "\n"


def import_runs(
    logdir: Path | str,
    experiment: str,
    *,
    client: Any = None,
    on_run: Callable[[Imported], object] = lambda imported: None,
    echo: Echo = lambda text: None,
) -> list[Imported]:
    """Import every folder of event files at or below a logdir; returns what each one's run got.

    A folder's run is recognised by its event files, also where the folder was moved, so a repeat adds what is new and nothing
    twice. A copy beside the original is a run of its own. The experiment is made where there is none. `on_run` is called after
    each run, `echo` with what is left out. Raises ValueError when the logdir has no event files or the experiment was
    deleted, store.StoreError (an OSError) when the store does not answer.
    """
    root = Path(logdir).resolve()
    folders = list(event_folders(root)) if root.is_dir() else []
    if not folders:
        raise ValueError(
            f"logdir is {str(logdir)!r}, which has no event files; expected a folder with *tfevents* in it or below"
        )
    client = client if client is not None else store.connect()
    experiment_id = _experiment(client, experiment)
    unclaimed = [run for run in store.runs(client, experiment_id) if FILES in run.data.tags]
    imported = []
    for path in folders:
        relative = path.relative_to(root).as_posix()
        name = root.name if relative == "." else relative
        folder = read_folder(path)
        run = _run_of(folder, unclaimed)
        if run is not None:
            unclaimed.remove(run)
            if run.data.tags[SOURCE] != str(path):
                echo(f"{name}: it was imported from {run.data.tags[SOURCE]}, and goes on in the same run")
        imported.append(_FolderImport(client, experiment_id, folder, name, run, echo)())
        on_run(imported[-1])
    return imported


def _run_of(folder: Folder, unclaimed: Iterable[Any]) -> Any:
    """The run that a folder was imported to, before or after the folder was moved; None if there is none."""
    files = set(folder.identities)
    same = [run for run in unclaimed if files & set(run.data.tags[FILES].split())]
    here = (run for run in same if run.data.tags[SOURCE] == str(folder.path))
    moved = (run for run in same if not files & set(identities(Path(run.data.tags[SOURCE]))))
    return next(here, None) or next(moved, None)


def _experiment(client: Any, name: str) -> str:
    with store.answers():
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            return str(client.create_experiment(name))
    if experiment.lifecycle_stage != "active":
        raise ValueError(f"experiment is {name!r}, which was deleted; expected one that was not, or a new name")
    return str(experiment.experiment_id)

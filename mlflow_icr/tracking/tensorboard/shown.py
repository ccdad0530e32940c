"""An operation's values in TensorBoard, by tag, at a step and a time; and the projector's files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_icr.tracking.operations import (
    DISTRIBUTIONS,
    FIGURE,
    SUMMARY,
    TABLE,
    Dataset,
    End,
    File,
    Metrics,
    Operation,
    Params,
    Picture,
    Tags,
)  # fmt: skip
from mlflow_icr.tracking.tensorboard.answer import VERDICT, summary_tag
from mlflow_icr.tracking.tensorboard.hparams import session_start, text_value

TABLE_ROWS = 50
BUCKETS = 64  # of a histogram
SPRITE = "sprite.png"


@dataclass(frozen=True)
class Shown:
    """A value of a tag at a step, as TensorBoard's Summary.Value; `number` where it is a scalar."""

    tag: str
    step: int
    seconds: float
    value: Any
    number: float | None = None


def shown(folder: Path, operation: Operation) -> Iterator[Shown]:
    """The values of an operation in event files, without values that depend on earlier operations."""
    match operation:
        case Metrics(values=values, step=step, time=time, texts=texts, source=source):
            for key, number in values.items():
                yield scalar(summary_tag(key) if source == SUMMARY else key, step, time / 1000, number)
            for key, text in texts.items():
                yield _text(key, step, time, text)
        case Tags(values=values, step=step, time=time):
            yield from _texts(values, step, time)
        case Params(values=values, time=time):
            for value in session_start(values, time / 1000).value:
                yield Shown(value.tag, 0, time / 1000, value)
        case Picture(key=key, step=step, time=time, path=path):
            yield from _image(folder / path, key, step, time)
        case File(role=role, path=path, name=name, step=step, time=time):
            if role == FIGURE:
                yield from _image(folder / path, f"figures/{name}", step, time)
            elif role == TABLE:
                yield _text(f"tables/{name}", step, time, _table(folder / path))
            elif role == DISTRIBUTIONS:
                yield from _histograms(folder / path, step, time)
        case Dataset(description=description, context=context):
            lines = [f"**{key}**: {description[key]}" for key in ("name", "digest", "profile") if key in description]
            yield _text(f"data/{context}", 0, 0, "\n\n".join(lines))
        case End(status=status, time=time):
            yield _text("status", 0, time, status)


def _texts(values: Mapping[str, str], step: int | None, time: int) -> Iterator[Shown]:
    """The verdict, and reasons for absent or uncertain values; tags of the run as one text."""
    if "verdict.text" in values:
        yield _text(VERDICT, step or 0, time, values["verdict.text"])
    elif step is None:
        lines = [f"**{key}**: {text}" for key, text in values.items() if not key.startswith("mlflow.")]
        if lines:
            yield _text("run", 0, time, "\n\n".join(lines))
    else:
        for key, text in values.items():
            kind, _, name = key.partition(".")
            yield _text(f"{kind}/{name}", step, time, text)


def scalar(key: str, step: int, seconds: float, number: float) -> Shown:
    """A scalar of the plain kind, float32, which every reader of event files knows."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    with np.errstate(over="ignore"):
        return Shown(key, step, seconds, Summary.Value(tag=key, simple_value=float(np.float32(number))), number)


def _text(tag: str, step: int, time: int, text: str) -> Shown:
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary()
    text_value(summary, f"{tag}/text_summary", text)
    return Shown(f"{tag}/text_summary", step, time / 1000, summary.value[0])


def _image(path: Path, key: str, step: int, time: int) -> Iterator[Shown]:
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    if not path.is_file():  # the file was removed; other operations do not depend on it
        return
    content = path.read_bytes()
    with Image.open(BytesIO(content)) as image:
        width, height, bands = *image.size, len(image.getbands())
    image = Summary.Image(height=height, width=width, colorspace=bands, encoded_image_string=content)
    yield Shown(key, step, time / 1000, Summary.Value(tag=key, image=image))


def _histograms(path: Path, step: int, time: int) -> Iterator[Shown]:
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

    if not path.is_file():
        return
    with np.load(path) as arrays:
        for key in arrays.files:
            numbers = np.asarray(arrays[key], dtype=np.float64).reshape(-1)
            numbers = numbers[np.isfinite(numbers)]
            if not len(numbers):
                continue
            counts, edges = np.histogram(numbers, BUCKETS)
            histogram = HistogramProto(
                min=numbers.min(), max=numbers.max(), num=len(numbers), sum=numbers.sum(), sum_squares=numbers @ numbers,
                bucket_limit=edges[1:].tolist(), bucket=counts.tolist(),
            )  # fmt: skip
            yield Shown(key, step, time / 1000, Summary.Value(tag=key, histo=histogram))


def _table(path: Path) -> str:
    """The first rows of a table, in Markdown."""
    content = json.loads(path.read_text())
    columns, rows = content["columns"], content["data"][:TABLE_ROWS]
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_projection(log_dir: Path, name: str, step: int, path: Path) -> None:
    """Write the vectors, thumbnails and texts of an embedding for the projector, replacing those of the same step."""
    from google.protobuf import text_format
    from PIL import Image
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    with np.load(path) as arrays:
        vectors, images, labels = arrays["vectors"], arrays["images"], arrays["labels"]
    place = f"projector/{step:05d}/{name}"
    folder = log_dir / place
    folder.mkdir(parents=True, exist_ok=True)
    np.savetxt(folder / "tensors.tsv", vectors, delimiter="\t", fmt="%.7g")
    with (folder / "metadata.tsv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([str(label)] for label in labels)
    side = int(np.ceil(np.sqrt(len(images))))
    height, width = images.shape[1:3]
    sprite = np.zeros((side * side, *images.shape[1:]), images.dtype)
    sprite[: len(images)] = images
    sprite = sprite.reshape(side, side, height, width, -1).swapaxes(1, 2).reshape(side * height, side * width, -1)
    Image.fromarray(sprite if sprite.shape[-1] == 3 else sprite[..., 0]).save(folder / SPRITE)
    config, config_path = ProjectorConfig(), log_dir / "projector_config.pbtxt"
    if config_path.exists():
        text_format.Parse(config_path.read_text(), config)
    tag = f"{name}:{step:05d}"
    others = [one for one in config.embeddings if one.tensor_name != tag]
    del config.embeddings[:]
    config.embeddings.extend(others)
    one = config.embeddings.add(tensor_name=tag, tensor_path=f"{place}/tensors.tsv")
    one.metadata_path = f"{place}/metadata.tsv"
    one.sprite.image_path = f"{place}/{SPRITE}"
    one.sprite.single_image_dim.extend([width, height])
    config_path.write_text(text_format.MessageToString(config))

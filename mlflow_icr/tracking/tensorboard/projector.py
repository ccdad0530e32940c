"""The files of TensorBoard's projector."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

SPRITE = "sprite.png"


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

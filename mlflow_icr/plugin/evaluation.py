"""The measurement of the evaluator `icr` of `mlflow.models.evaluate`: its configuration, its images, and one report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mlflow_icr.extraction.denoisers import Denoiser
from mlflow_icr.extraction.encoders import load_encoder
from mlflow_icr.extraction.images import (
    RASTER_SUFFIXES,
    ImageSet,
    Size,
    folder_labels,
    height_width,
    named,
    read_files,
    read_images,
)
from mlflow_icr.monitoring import GenerationMonitor, ICRMonitor, Protocol, Report

SIGMA = "sigma"  # another name of the protocol's sigmas


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key} is {value!r}; expected {allowed}")


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluator's configuration; refuses impossible values, naming key, value and what is allowed.

    `train` and `heldout` are folders, `.zip` or `.npz` files of images; `pipeline` a diffusers folder, or an address that
    MLflow can download one from, where there is no model. `num_samples` 0 leaves generated images out. `images_seen` says how
    far the model was trained; a checkpoint of a run says so itself. `device` None means a GPU where there is one. All other
    keys are the protocol's.
    """

    train: Path | str | None = None
    heldout: Path | str | None = None
    pipeline: Path | str | None = None
    num_samples: int = 128
    num_steps: int = 18
    encoder: str = "pixels"
    encoder_weights: Path | str | None = None
    companions: Sequence[str] = ()
    images_seen: int = 0
    batch_size: int = 256
    device: str | None = None
    protocol: Protocol = field(default_factory=Protocol)

    def __post_init__(self) -> None:
        for key in ("train", "heldout"):
            value = getattr(self, key)
            readable = isinstance(value, (str, Path)) and (
                Path(value).is_dir() or (Path(value).is_file() and Path(value).suffix in (".zip", ".npz"))
            )
            _require(value is None or readable, key, value, "a folder, or a .zip or .npz file, of images")
        for key in ("pipeline", "encoder_weights"):
            value = getattr(self, key)
            _require(value is None or (isinstance(value, (str, Path)) and bool(str(value))), key, value, "a path")
        for key, least in (("num_samples", 0), ("num_steps", 2), ("images_seen", 0), ("batch_size", 1)):
            _require(_is_whole(getattr(self, key), least), key, getattr(self, key), f"a whole number >= {least}")
        _require(isinstance(self.encoder, str) and bool(self.encoder), "encoder", self.encoder, "an encoder's name")
        companions = self.companions
        listed = isinstance(companions, (list, tuple)) and all(isinstance(name, str) for name in companions)
        _require(listed, "companions", companions, "a list of names")
        fitted = self.protocol.projection is None or self.images_seen > 0
        _require(
            fitted, "images_seen", self.images_seen, "a number > 0 where projection is given: it is fitted to a trained model"
        )
        self.torch_device()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> EvaluationConfig:
        """The configuration from `evaluator_config`. Raises ValueError, also for unknown keys."""
        own_keys = {entry.name for entry in fields(cls)} - {"protocol"}
        protocol_keys = {entry.name for entry in fields(Protocol)}
        for key in config:
            _require(
                key in own_keys | protocol_keys | {SIGMA},
                "evaluator_config's key",
                key,
                f"one of {', '.join(sorted(own_keys | protocol_keys))}",
            )
        if SIGMA in config:
            _require("sigmas" not in config, SIGMA, config[SIGMA], "nothing where sigmas is given")
            config = {"sigmas" if key == SIGMA else key: value for key, value in config.items()}
        protocol = Protocol(**{key: value for key, value in config.items() if key in protocol_keys})
        return cls(**{key: value for key, value in config.items() if key in own_keys}, protocol=protocol)

    def torch_device(self) -> torch.device:
        """Where to measure. Raises ValueError for a device that is not there."""
        if self.device is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError, TypeError):  # torch's answers to unknown names, absent drivers and no name at all
            raise ValueError(f"device is {self.device!r}; expected cpu, or cuda where there is a GPU") from None


def image_files(features: object) -> list[str] | None:
    """The paths in an evaluation's data: the first column that holds only names of image files; None if there is none."""
    columns: list[list[object]] = []
    if isinstance(features, pd.DataFrame):
        columns = [list(features[name]) for name in features.columns]
    elif isinstance(features, np.ndarray) and features.ndim == 2:
        columns = [list(column) for column in features.T]
    for column in columns:
        if column and all(isinstance(value, str) and Path(value).suffix.lower() in RASTER_SUFFIXES for value in column):
            return [str(value) for value in column]
    return None


@dataclass(frozen=True, eq=False)
class Images:
    """Training and held-out images, (N, C, H, W), and the classes (N,) of the training images where they are known."""

    train: Tensor
    heldout: Tensor | None = None
    labels: Tensor | None = None


def _complete_set(key: str, image_set: ImageSet) -> Tensor:
    """All images of a set. Raises ValueError naming the files that cannot be read."""
    total = len(image_set.images) + len(image_set.unreadable)
    if image_set.unreadable:
        raise ValueError(f"{key}: {len(image_set.unreadable)} of {total} images cannot be read: {named(image_set.unreadable)}")
    return image_set.images


def _from_data(features: object, size: Size, channels: int | None) -> Tensor | None:
    """The images in an evaluation's data: files, or rows of pixels as `from_tensor` gives them; None if there are none."""
    files = image_files(features)
    if files is not None:
        return _complete_set("data", read_files(files, size))
    pixels = math.prod(height_width(size))
    if isinstance(features, np.ndarray) and channels is not None and features.shape[1:] == (channels * pixels,):
        return torch.from_numpy(features).view(-1, channels, *height_width(size))
    return None


def load_images(config: EvaluationConfig, features: object, size: Size, channels: int | None) -> Images:
    """The images to measure on, at the network's size in pixels and with its channels.

    Training images come from `config.train`, or else from the evaluation's data. Raises ValueError where both or neither
    are there, and for images that do not fit the network.
    """
    data_images = _from_data(features, size, channels)
    labels = None
    if config.train is None:
        if data_images is None:
            raise ValueError(
                "train is not given; expected a folder, .zip or .npz file of the training images, or data with their paths"
            )
        train = data_images
    else:
        _require(data_images is None, "train", str(config.train), "nothing where data are images already")
        train = _complete_set("train", read_images(config.train, size))
        labels = folder_labels(config.train) if Path(config.train).is_dir() else None
    heldout = None if config.heldout is None else _complete_set("heldout", read_images(config.heldout, size))
    for key, images in (("train", train), ("heldout", heldout)):
        if images is not None and channels is not None and images.shape[1] != channels:
            raise ValueError(f"{key} images have {images.shape[1]} channel(s); the network takes {channels}")
    return Images(train, heldout, labels)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The report, the protocol with its numbers fixed, and D, the width of the layer."""

    report: Report
    protocol: Protocol
    dim: int


def evaluate_denoiser(denoiser: Denoiser, images: Images, config: EvaluationConfig) -> Evaluation:
    """ICR with its interval and energies, and the metrics of samples, of a denoiser on its training images.

    Raises ValueError, before anything is measured, for a layer, encoder, companion or number that does not fit.
    """
    device = config.torch_device()
    denoiser.network.to(device)
    monitor = ICRMonitor(
        denoiser,
        images.train,
        config.protocol,
        companions=config.companions,
        labels=images.labels,
        pictures=True,
        batch_size=config.batch_size,
    )
    generation = None
    if config.num_samples:
        generation = GenerationMonitor(
            denoiser,
            images.train,
            images.heldout,
            encoder=load_encoder(
                config.encoder, weights=config.encoder_weights, shape=tuple(images.train.shape[1:]), device=device
            ),
            num_samples=config.num_samples,
            num_steps=config.num_steps,
            seed=config.protocol.seed,
            batch_size=config.batch_size,
        )
    report = monitor.measure(config.images_seen)
    if generation is not None:
        report = report.joined(generation.measure(config.images_seen))
    return Evaluation(report, monitor.protocol, monitor.dim)

"""A diffusers folder as a model that samples: what MLflow loads for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from mlflow_icr.tracking.checkpoints.model_folder import ARTIFACT, COLUMNS

BATCH = 256
DEFAULTS = {"num_images": 1, "seed": 0, "steps": 18}  # steps: Karras et al. 2022, for CIFAR-10
LEAST = {"num_images": 0, "seed": 0, "steps": 2, "class_label": 0}


def sample_images(
    loaded: tuple[Any, Any], indices: Sequence[int], *, seed: int = 0, steps: int = 18, class_label: int | None = None
) -> np.ndarray:
    """Images (N, H, W, C) uint8 of a loaded denoiser: samples `indices` of a seed, whatever the batch.

    Without `class_label` a network of classes is told none. Raises ValueError for a class that the network does not have.
    """
    import torch

    from mlflow_icr.extraction.adapters.choose import image_channels
    from mlflow_icr.extraction.denoisers import evaluating
    from mlflow_icr.extraction.images import height_width
    from mlflow_icr.extraction.samplers import sample, starting_noise
    from mlflow_icr.monitoring.generation import to_uint8

    denoiser, side = loaded
    network = denoiser.network
    _check_class(denoiser, class_label)
    shape = (int(network.config["in_channels"]), *height_width(network.config["sample_size"]))  # of images, or of their latents
    images = [np.empty((0, *height_width(side), image_channels(denoiser) or 0), np.uint8)]
    with evaluating(network):
        for start in range(0, len(indices), BATCH):
            noise = starting_noise(indices[start : start + BATCH], shape, seed)
            labels = None if class_label is None else torch.full((len(noise),), class_label)
            sampled = sample(denoiser, noise, num_steps=steps, labels=labels)
            images.append(to_uint8(sampled).permute(0, 2, 3, 1).numpy())
    return np.concatenate(images)


def _check_class(denoiser: Any, class_label: int | None) -> None:
    if class_label is None:
        return
    null = getattr(denoiser, "null_class", None)
    if null is None:
        raise ValueError(f"class_label is {class_label}, but this model was trained without classes; expected none")
    if class_label > null:
        raise ValueError(f"class_label is {class_label}; expected a class of this model, 0 to {null}, which means none")


def requests_of(model_input: Any) -> list[dict[str, int]]:
    """The rows of a request with their defaults. Raises ValueError for a column or value that is not allowed."""
    if isinstance(model_input, Mapping):
        columns = {key: np.atleast_1d(value).tolist() for key, value in model_input.items()}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    else:
        columns, rows = model_input.columns, model_input.to_dict(orient="records")
    if not len(columns):  # all of it by default
        rows = [{}]
    filled = []
    for row in rows:
        for key, value in row.items():
            if key not in COLUMNS:
                raise ValueError(f"column is {key!r}; expected some of {', '.join(COLUMNS)}")
            if value != int(value) or value < LEAST[key]:
                raise ValueError(f"{key} is {value}; expected a whole number >= {LEAST[key]}")
        filled.append(DEFAULTS | {key: int(value) for key, value in row.items()})
    return filled


class SamplingModel(PythonModel):  # type: ignore[misc]
    """A checkpoint as an MLflow model. Weights are read at the first prediction."""

    def load_context(self, context: PythonModelContext) -> None:
        """Keep the path of the pipeline."""
        self.folder = Path(context.artifacts[ARTIFACT])
        self._loaded: Any = None

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> np.ndarray:
        """Images (N, H, W, C) uint8 for rows or a dict of num_images, seed, steps and class_label, each of them optional.

        Image i of a seed is the same however many are asked for. Raises ValueError for a value that is not allowed.
        """
        from mlflow_icr.extraction.pipelines import load_denoiser

        rows = requests_of(model_input) or [DEFAULTS | {"num_images": 0}]
        self._loaded = self._loaded or load_denoiser(self.folder)
        return np.concatenate(
            [
                sample_images(
                    self._loaded,
                    range(row["num_images"]),
                    seed=row["seed"],
                    steps=row["steps"],
                    class_label=row.get("class_label"),
                )
                for row in rows
            ]
        )

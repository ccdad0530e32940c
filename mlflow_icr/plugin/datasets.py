"""Image sets as MLflow datasets: `mlflow.data.from_image_folder` and `mlflow.data.from_tensor`. Loads no torch until called."""

# No `from __future__ import annotations`: MLflow wants the constructors' return annotation to be the class, not its name.
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from mlflow.data.dataset import Dataset
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.pyfunc_dataset_mixin import PyFuncConvertibleDatasetMixin, PyFuncInputsOutputs

if TYPE_CHECKING:
    from mlflow.data.evaluation_dataset import EvaluationDataset
    from mlflow.data.schema import TensorDatasetSchema
    from torch import Tensor

DIGEST_LENGTH = 36  # hexadecimal digits of a SHA-256: what MLflow's stores take
PATH = "path"  # the column of a folder's files
MOST_SIZES = 20  # a profile lists the commonest image sizes, up to this number


class ImageDataset(Dataset, PyFuncConvertibleDatasetMixin):  # type: ignore[misc]
    """Images as a dataset that runs can have as input, and that `mlflow.models.evaluate` takes as data.

    `features` are a frame of file paths, or pixels (N, C * H * W); `shape` is that of all images, -1 where it varies; `facts`
    become the profile. Raises ValueError for a digest that MLflow's stores would not take.
    """

    def __init__(
        self,
        features: pd.DataFrame | np.ndarray,
        shape: tuple[int, ...],
        dtype: str,
        facts: Mapping[str, object],
        source: DatasetSource,
        name: str | None,
        digest: str,
    ) -> None:
        if not 1 <= len(digest) <= DIGEST_LENGTH:
            raise ValueError(f"digest is {digest!r}; expected 1 to {DIGEST_LENGTH} characters")
        self.features, self.shape, self.dtype = features, shape, dtype
        self._facts = dict(facts)
        super().__init__(source=source, name=name, digest=digest)

    def _compute_digest(self) -> str:
        raise AssertionError("the digest is always given")

    @property
    def profile(self) -> dict[str, object]:
        """Number, shape and dtype of the images, and further facts on them."""
        return {"num_images": len(self.features), "shape": list(self.shape), "dtype": self.dtype} | self._facts

    @property
    def schema(self) -> "TensorDatasetSchema":
        """One tensor: dtype and shape, with -1 for the number of images and for what varies."""
        from mlflow.data.schema import TensorDatasetSchema
        from mlflow.types import Schema, TensorSpec

        return TensorDatasetSchema(Schema([TensorSpec(np.dtype(self.dtype), (-1, *self.shape[1:]))]))

    def to_dict(self) -> dict[str, str]:
        """Name, digest, source, source type, schema and profile, each as text."""
        return {
            **super().to_dict(),
            "schema": json.dumps(self.schema.to_dict()),
            "profile": json.dumps(self.profile),
        }

    def to_pyfunc(self) -> PyFuncInputsOutputs:
        """The features as the input of a model."""
        return PyFuncInputsOutputs([self.features])

    def to_evaluation_dataset(self, path: str | None = None, feature_names: list[str] | None = None) -> "EvaluationDataset":
        """The features as data of `mlflow.models.evaluate`, under the same name and digest."""
        from mlflow.data.evaluation_dataset import EvaluationDataset

        return EvaluationDataset(self.features, path=path, feature_names=feature_names, name=self.name, digest=self.digest)


def _source(source: str | Path | DatasetSource | None) -> DatasetSource:
    """A source as MLflow's own constructors take it: none means the program that runs, a path a place on this machine."""
    from mlflow.data import sources
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.tracking.context.registry import resolve_tags

    if source is None:
        return CodeDatasetSource(tags=resolve_tags())
    if isinstance(source, Path):
        return sources.LocalArtifactDatasetSource(str(source))  # resolving a local path makes MLflow warn
    return source if isinstance(source, DatasetSource) else resolve_dataset_source(source)


def from_image_folder(
    folder: str | Path,
    name: str | None = None,
    digest: str | None = None,
    source: str | Path | DatasetSource | None = None,
) -> ImageDataset:
    """All image files below a folder. The digest is of their relative names and bytes, in any order.

    `name` is the folder's own unless given, `source` the folder. Raises ValueError for a folder without images.
    """
    from mlflow_icr.extraction.images import GREY_MODES, folder_facts, image_paths

    folder = Path(folder).resolve()
    facts = folder_facts(folder)
    channels = {1 if mode in GREY_MODES else 3 for mode in facts.modes}
    sides = [tuple(int(side) for side in reversed(size.split("x"))) for size in facts.sizes]
    shape = (channels.pop() if len(channels) == 1 else -1, *(sides[0] if len(sides) == 1 else (-1, -1)))
    return ImageDataset(
        pd.DataFrame({PATH: [str(path) for path in image_paths(folder)]}),
        (facts.num_images, *shape),
        "uint8",
        {
            "num_images": facts.num_images,
            "num_unreadable": len(facts.unreadable),
            "num_bytes": facts.num_bytes,
            "sizes": dict(sorted(facts.sizes.items(), key=lambda item: -item[1])[:MOST_SIZES]),
            "modes": facts.modes,
            "sha256": facts.sha256,
        },
        _source(folder if source is None else source),
        name or folder.name,
        digest or facts.sha256[:DIGEST_LENGTH],
    )


def from_tensor(
    images: "Tensor | np.ndarray",
    source: str | Path | DatasetSource | None = None,
    name: str | None = None,
    digest: str | None = None,
) -> ImageDataset:
    """Images (N, C, H, W), a tensor or an array. The digest is of dtype, shape and pixels, unless it is given.

    `source` is where they come from, as MLflow takes it; none means the program that runs. Raises ValueError for another
    number of dimensions, or for no images.
    """
    import torch

    from mlflow_icr.extraction.images import content_hash

    pixels = torch.as_tensor(images).detach().cpu()
    if pixels.ndim != 4 or not len(pixels):
        raise ValueError(f"images have shape {tuple(pixels.shape)}; expected (N, C, H, W) with N >= 1")
    if pixels.dtype == torch.bfloat16:
        raise ValueError("images are of bfloat16; expected uint8, or another dtype that numpy has")
    return ImageDataset(
        pixels.flatten(1).numpy(),
        tuple(pixels.shape),
        str(pixels.numpy().dtype),
        {},
        _source(source),
        name,
        digest or content_hash(pixels)[:DIGEST_LENGTH],
    )

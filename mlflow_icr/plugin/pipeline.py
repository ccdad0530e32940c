"""Diffusers folders as MLflow models: log one, find the one of a model, download one."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow

from mlflow_icr.tracking.checkpoints.folder import INDEX, copy_pipeline, is_pipeline
from mlflow_icr.tracking.checkpoints.model_folder import ARTIFACT, CODE, signature
from mlflow_icr.version import __version__

if TYPE_CHECKING:
    from mlflow.models.model import ModelInfo


def log_pipeline(folder: Path | str, name: str = ARTIFACT, **arguments: Any) -> ModelInfo:
    """Log a diffusers folder, such as a run's checkpoint, as an MLflow model that can be evaluated; returns its info.

    It samples as a run's checkpoints do: see `SamplingModel`.

    `arguments` are those of `mlflow.pyfunc.log_model`. Only the pipeline is copied, not what training needs to continue.
    Raises ValueError for a folder that holds no pipeline.
    """
    folder = Path(folder)
    if not is_pipeline(folder):
        raise ValueError(f"folder is {str(folder)!r}; expected a diffusers folder with unet/ and scheduler/")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / ARTIFACT
        copy_pipeline(folder, copy)
        defaults = {"pip_requirements": [f"mlflow-icr=={__version__}"], "model_type": "diffusion", "signature": signature()}
        return mlflow.pyfunc.log_model(
            name=name, python_model=str(CODE), artifacts={ARTIFACT: str(copy)}, **(defaults | arguments)
        )


def pipeline_of(model: Any) -> Path:
    """The diffusers folder among the artifacts of a loaded pyfunc model, of any class.

    Raises ValueError when there is none, or more than one.
    """
    # MLflow keeps a loaded model's artifacts there, and shows them nowhere else.
    context = getattr(getattr(model, "_model_impl", None), "context", None)
    artifacts = getattr(context, "artifacts", None) or {}
    pipelines = {name: Path(path) for name, path in artifacts.items() if is_pipeline(Path(path))}
    if len(pipelines) != 1:
        raise ValueError(
            f"model has {len(pipelines)} diffusers folders among its artifacts ({', '.join(artifacts) or 'it has none'}); "
            "expected one, as mlflow_icr.plugin.pipeline.log_pipeline logs it, and env_manager 'local'; or model=None and "
            "evaluator_config's pipeline"
        )
    return pipelines.popitem()[1]


def images_seen_of(model: Any) -> int:
    """The images seen in training, from the metadata of a loaded pyfunc model, as a run's checkpoints have them; else 0."""
    described = getattr(getattr(model, "metadata", None), "metadata", None) or {}
    images_seen = described.get("images_seen", 0)
    return images_seen if isinstance(images_seen, int) and images_seen > 0 else 0


def without_password(place: Path | str) -> str:
    """A path or address without the user and password that it can hold."""
    return re.sub(r"//[^/@]*@", "//", str(place))


def download_pipeline(place: Path | str) -> Path:
    """The diffusers folder at a path, or at an address that MLflow knows, such as models:/NAME/1 or runs:/ID/checkpoint.

    A logged model's folder is searched for it. Raises ValueError when there is none.
    """
    folder = Path(place)
    if not folder.is_dir():
        try:
            folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=str(place)))
        except Exception as error:  # each store's client has its own errors
            raise ValueError(
                f"pipeline is {without_password(place)!r}, which cannot be downloaded ({type(error).__name__})"
            ) from None
    if is_pipeline(folder):
        return folder
    folders = sorted({path.parent for path in folder.rglob(INDEX)})
    if len(folders) != 1:
        raise ValueError(f"pipeline is {without_password(place)!r}, which holds {len(folders)} diffusers folders; expected one")
    return folders[0]

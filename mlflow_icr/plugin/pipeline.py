"""Diffusers folders as MLflow models: logging one, and finding it again."""

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

    `arguments` are those of `mlflow.pyfunc.log_model`. Only the pipeline is copied, not what training needs to go on. Raises
    ValueError for a folder that holds no pipeline.
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
    found = {name: Path(path) for name, path in artifacts.items() if is_pipeline(Path(path))}
    if len(found) != 1:
        raise ValueError(
            f"model has {len(found)} diffusers folders among its artifacts ({', '.join(artifacts) or 'it has none'}); expected "
            "one, as mlflow_icr.plugin.pipeline.log_pipeline logs it, and env_manager 'local'; or model=None and "
            "evaluator_config's pipeline"
        )
    return found.popitem()[1]


def images_seen_of(model: Any) -> int:
    """How far a loaded pyfunc model was trained, as a run's checkpoints say it of themselves; 0 where a model does not."""
    described = getattr(getattr(model, "metadata", None), "metadata", None) or {}
    found = described.get("images_seen", 0)
    return found if isinstance(found, int) and found > 0 else 0


def without_password(place: Path | str) -> str:
    """A path or address as it may be shown: without the user and password that an address can hold."""
    return re.sub(r"//[^/@]*@", "//", str(place))


def download_pipeline(place: Path | str) -> Path:
    """The diffusers folder at a path, or at an address that MLflow knows, such as models:/NAME/1 or runs:/ID/checkpoint.

    A logged model is searched for it. Raises ValueError when there is none.
    """
    folder = Path(place)
    if not folder.is_dir():
        try:
            folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=str(place)))
        except Exception as error:  # stores and their clients raise what they like
            raise ValueError(f"pipeline is {without_password(place)!r}, which cannot be had ({type(error).__name__})") from None
    if is_pipeline(folder):
        return folder
    found = sorted({path.parent for path in folder.rglob(INDEX)})
    if len(found) != 1:
        raise ValueError(f"pipeline is {without_password(place)!r}, which holds {len(found)} diffusers folders; expected one")
    return found[0]

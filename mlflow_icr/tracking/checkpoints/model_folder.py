"""The files that make a diffusers folder an MLflow model: what to load, with what, and what it takes. Nothing is pickled.

MLflow's `log_model` would copy the weights, run the code and look for its requirements, for seconds; all of that is known here.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from mlflow_icr.version import __version__

CODE = Path(__file__).with_name("pipeline_code.py")
ARTIFACT = "pipeline"
PIPELINE = f"artifacts/{ARTIFACT}"  # the diffusers folder in the model, where MLflow's own models have it
# Columns of a request, all of them optional: how many images, from which seed, by how many steps, of which class.
COLUMNS = ("num_images", "seed", "steps", "class_label")


def signature() -> Any:
    """What the model takes, whole numbers by name, and gives, images (N, H, W, C) uint8."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    inputs = Schema([ColSpec("long", name, required=False) for name in COLUMNS])
    return ModelSignature(inputs=inputs, outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, -1))]))


def requirements() -> list[str]:
    """What a model needs to be loaded elsewhere."""
    import mlflow

    return [f"mlflow=={mlflow.__version__}", f"mlflow-icr=={__version__}"]


def write_model_files(folder: Path, model: Any, images_seen: int) -> list[Path]:
    """Write all files of a LoggedModel but its weights; returns them, the one that makes it a model last."""
    import mlflow
    import yaml
    from mlflow.models import Model

    needed, python = requirements(), platform.python_version()
    conda = {"name": "mlflow-env", "channels": ["conda-forge"], "dependencies": [f"python={python}", "pip", {"pip": needed}]}
    environment = {"python": python, "build_dependencies": ["pip", "setuptools", "wheel"]}
    contents = {
        CODE.name: CODE.read_text(encoding="utf-8"),
        "requirements.txt": "\n".join(needed) + "\n",
        "conda.yaml": yaml.safe_dump(conda, sort_keys=False),
        "python_env.yaml": yaml.safe_dump(environment | {"dependencies": ["-r requirements.txt"]}, sort_keys=False),
    }
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")
    described = Model(
        artifact_path=model.artifact_location,
        run_id=model.source_run_id,
        model_id=model.model_id,
        model_uuid=model.model_id,
        signature=signature(),
        metadata={"images_seen": images_seen},
    )
    mlflow.pyfunc.add_to_model(
        described,
        loader_module="mlflow.pyfunc.loaders.code_model",
        conda_env="conda.yaml",
        python_env="python_env.yaml",
        model_code_path=CODE.name,
        artifacts={ARTIFACT: {"path": PIPELINE, "uri": PIPELINE}},
    )
    described.save(folder / "MLmodel")
    return [*(folder / name for name in contents), folder / "MLmodel"]

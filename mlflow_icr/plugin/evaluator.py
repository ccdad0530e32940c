"""The evaluator `icr` of `mlflow.models.evaluate`. Loads no torch until it evaluates."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models.evaluation import EvaluationArtifact, EvaluationResult, ModelEvaluator

from mlflow_icr.version import __version__

if TYPE_CHECKING:
    from mlflow_icr.monitoring import Report
    from mlflow_icr.plugin.evaluation import Evaluation, EvaluationConfig, Images

MODEL_TYPE = "diffusion"
FOLDER = "icr"  # of the run's artifacts
PROTOCOL = "protocol.json"
MOST_TAGS, MOST_TEXT = 100, 8000  # what MLflow takes in one batch, and for one tag

logger = logging.getLogger(__name__)


class ICREvaluator(ModelEvaluator):  # type: ignore[misc]
    """ICR, energies and memorization of a diffusion model on its training images.

    `evaluator_config` is read by `EvaluationConfig`. Nothing is measured or judged here.
    """

    @classmethod
    def can_evaluate(cls, *, model_type: str | None, evaluator_config: Mapping[str, Any] | None, **kwargs: Any) -> bool:
        """Whether the model type is "diffusion"; MLflow asks every evaluator where the caller names none."""
        return model_type == MODEL_TYPE

    def evaluate(
        self,
        *,
        model_type: str,
        dataset: Any,
        run_id: str,
        evaluator_config: Mapping[str, Any] | None,
        model: Any = None,
        model_id: str | None = None,
        **kwargs: Any,
    ) -> EvaluationResult:
        """Measure the pipeline of `model`, log to the run, and return metrics and artifacts.

        Raises MlflowException, in one line, for a model, configuration or images that do not fit.
        """
        from mlflow_icr.extraction.adapters.choose import image_channels
        from mlflow_icr.extraction.pipelines import load_denoiser
        from mlflow_icr.plugin.evaluation import EvaluationConfig, evaluate_denoiser, load_images
        from mlflow_icr.plugin.pipeline import download_pipeline, images_seen_of, pipeline_of

        for name in ("extra_metrics", "custom_artifacts"):  # they may be meant for another evaluator
            if kwargs.get(name):
                logger.warning("%s are not for the evaluator icr, which makes no use of them", name)
        try:
            config = EvaluationConfig.of({"images_seen": images_seen_of(model)} | dict(evaluator_config or {}))
            if (model is None) == (config.pipeline is None):
                which = "both" if model is not None else "neither"
                raise ValueError(f"model and evaluator_config's pipeline: {which} given; expected one of them")
            folder = pipeline_of(model) if config.pipeline is None else download_pipeline(config.pipeline)
            denoiser, side = load_denoiser(folder)
            images = load_images(config, getattr(dataset, "features_data", None), side, image_channels(denoiser))
            evaluation = evaluate_denoiser(denoiser, images, config)
        except (ValueError, OSError) as error:
            raise MlflowException.invalid_parameter_value(f"evaluator icr: {error}") from error
        return _log(evaluation, config, images, run_id, own_metrics=model_id is None)


def _log(
    evaluation: Evaluation, config: EvaluationConfig, images: Images, run_id: str, *, own_metrics: bool
) -> EvaluationResult:
    """Write an evaluation to the disk, then log it; the folder stays if the server does not take it."""
    for key, why in evaluation.report.absent.items():
        logger.warning("%s is not measured: %s", key, why)
    for key, text in evaluation.report.warnings.items():
        logger.warning("%s is %s", key, text)
    folder = Path(tempfile.mkdtemp(prefix="mlflow-icr-"))
    pictures = _write(evaluation, config, images, folder)
    client = MlflowClient()
    try:
        client.log_artifacts(run_id, str(folder), FOLDER)
        _log_values(client, run_id, evaluation.report, own_metrics)
        _log_images(client, run_id, config, images)
        uri = f"{client.get_run(run_id).info.artifact_uri}/{FOLDER}"
        artifacts = {name: _artifact(folder / path, f"{uri}/{path}") for name, path in pictures.items()}
    except Exception as error:
        logger.debug("logging failed", exc_info=error)
        # The type only: a tracking URI, which may hold a password, can be part of the message.
        raise MlflowException(
            f"evaluator icr: the run does not take results ({type(error).__name__}); they are in {folder}"
        ) from None
    shutil.rmtree(folder)
    return EvaluationResult(dict(evaluation.report.values), artifacts)


def _write(evaluation: Evaluation, config: EvaluationConfig, images: Images, folder: Path) -> dict[str, str]:
    """Write an output folder of one measurement with its protocol; returns the artifacts' paths in it by name."""
    from mlflow_icr.extraction.images import content_hash
    from mlflow_icr.plugin.pipeline import without_password
    from mlflow_icr.tracking import Journal

    report = evaluation.report
    journal = Journal(folder)
    journal.append(report)
    shown = {key: value for key, value in asdict(config).items() if key != "protocol"}
    if config.pipeline is not None:
        shown["pipeline"] = without_password(config.pipeline)
    content = {
        "protocol": asdict(evaluation.protocol),
        "protocol_digest": evaluation.protocol.digest,
        "feature_dim": evaluation.dim,
        "images_seen": report.step,
        "train_sha256": content_hash(images.train),
        "heldout_sha256": None if images.heldout is None else content_hash(images.heldout),
        "config": shown,
        "absent": dict(report.absent),
        "warnings": dict(report.warnings),
        "mlflow_icr": __version__,
    }
    (folder / PROTOCOL).write_text(json.dumps(content, indent=2, default=str) + "\n")
    pictures = {key: journal.picture(key, report.step).relative_to(folder).as_posix() for key in report.figures}
    return pictures | {"protocol": PROTOCOL}


def _log_values(client: MlflowClient, run_id: str, report: Report, own_metrics: bool) -> None:
    """Log reasons and warnings as tags, and the values too, unless MLflow does so itself, as for a logged model."""
    now = time.time_ns() // 1_000_000
    metrics = [Metric(key, value, now, report.step) for key, value in report.values.items()] if own_metrics else []
    texts = {"icr.protocol_digest": report.protocol_digest}
    texts |= {f"absent.{key}": why for key, why in report.absent.items()}
    texts |= {f"warning.{key}": text for key, text in report.warnings.items()}
    tags = [RunTag(key, text[:MOST_TEXT]) for key, text in texts.items()]
    client.log_batch(run_id, metrics=metrics, tags=tags[:MOST_TAGS])


def _log_images(client: MlflowClient, run_id: str, config: EvaluationConfig, images: Images) -> None:
    """Log the configuration's images as inputs of the run; MLflow has logged the evaluation's data already."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    from mlflow_icr.plugin.datasets import from_tensor

    inputs = []
    for context, path, pixels in (("training", config.train, images.train), ("validation", config.heldout, images.heldout)):
        if path is not None and pixels is not None:
            place = Path(path).resolve()
            entity = Dataset(**from_tensor(pixels, source=place, name=place.stem).to_dict())
            inputs.append(DatasetInput(entity, [InputTag(MLFLOW_DATASET_CONTEXT, context)]))
    if inputs:
        client.log_inputs(run_id, inputs)


def _artifact(path: Path, uri: str) -> EvaluationArtifact:
    """A written file as an artifact whose content is loaded."""
    from mlflow.models.evaluation.artifacts import ImageEvaluationArtifact, JsonEvaluationArtifact

    artifact = (JsonEvaluationArtifact if path.suffix == ".json" else ImageEvaluationArtifact)(uri)
    artifact._load(str(path))
    return artifact

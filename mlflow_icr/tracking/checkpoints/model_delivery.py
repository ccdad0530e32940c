"""Deliver checkpoints to MLflow, each as a LoggedModel of the run, with its metrics, its weights and a sampler."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow_icr.tracking.checkpoints.folder import is_pipeline, pipeline_files
from mlflow_icr.tracking.checkpoints.model_folder import PIPELINE, write_model_files
from mlflow_icr.tracking.keys import METRICS_PER_CALL, NOT_MLFLOW, clean_key
from mlflow_icr.tracking.mlflow.failures import RefusalError
from mlflow_icr.tracking.operations import Model

MODEL_TYPE = "diffusion"
EXTERNAL = "mlflow.model.isExternal"  # MLflow's own tag for models whose weights it does not have
# Tags of a model. `role` is turning (the one to keep) or newest; `weights` says where they are.
STEP_TAG, ROLE_TAG, WEIGHTS_TAG = "images_seen", "role", "weights"
TURNING, NEWEST = "turning", "newest"
ALIAS = "keep"  # of a registered model: the checkpoint to keep
UPLOADED, LOCAL, REMOVED = "uploaded", "in the output folder", "removed from the output folder before they were uploaded"


def model_name(images_seen: int) -> str:
    """The name of a checkpoint as a model."""
    return f"checkpoint-{images_seen:012d}"


class ModelDelivery:
    """Delivers a folder's checkpoints to its run in MLflow; each model is looked up before it is made, so there is only one."""

    def __init__(self, client: Any, run_id: str, experiment_id: str, folder: Path) -> None:
        self._client, self.run_id, self.experiment_id, self.folder = client, run_id, experiment_id, folder

    def send(self, checkpoint: Model, params: Mapping[str, str], *, weights: bool, newest: int, turning: int | None) -> None:
        """Deliver a checkpoint: its model, metrics and, if `weights`, its files; then set the roles of `newest` and `turning`.

        `params` are the run's parameters, which MLflow may not have yet. Raises RefusalError when the store has no models, and
        what MLflow raises.
        """
        from mlflow.exceptions import MlflowException

        try:
            existing = self._named(checkpoint.step)
            model = self._model(checkpoint.step, params, existing)
            self._link_metrics(model, checkpoint)
            self._finish(model, checkpoint, weights, {} if existing is None else self._sizes(model.model_id))
            self._set_roles(newest, turning)
        except NotImplementedError:
            raise RefusalError("this store has no logged models; checkpoints stay in the output folder") from None
        except MlflowException as error:
            if error.error_code == "ENDPOINT_NOT_FOUND":  # MLflow 2
                raise RefusalError("this server has no logged models; checkpoints stay in the output folder") from None
            raise

    def register(self, step: int, name: str) -> None:
        """Give the checkpoint the alias `keep` of a registered model, which is made where there is none.

        Idempotent. A model without weights cannot be loaded, and gets none.
        """
        from mlflow.exceptions import MlflowException

        model = self._named(step)
        if model is None or model.tags.get(WEIGHTS_TAG) != UPLOADED:
            return
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = self._client.search_model_versions(f"name = '{name}'")
        version = next((version for version in versions if version.source == model.artifact_location), None)
        if version is None:
            version = self._client.create_model_version(
                name, model.artifact_location, run_id=self.run_id, model_id=model.model_id, tags={STEP_TAG: str(step)}
            )
        self._client.set_registered_model_alias(name, ALIAS, version.version)

    def _search(self, condition: str) -> list[Any]:
        """The run's models that meet a condition, oldest first."""
        return list(
            self._client.search_logged_models(
                [self.experiment_id],
                f"source_run_id = '{self.run_id}' AND {condition}",
                order_by=[{"field_name": "creation_timestamp", "ascending": True}],
            )
        )

    def _named(self, images_seen: int) -> Any:
        return next(iter(self._search(f"name = '{model_name(images_seen)}'")), None)

    def _model(self, step: int, params: Mapping[str, str], model: Any) -> Any:
        """The checkpoint's model, made where there is none, and an output of the run."""
        from mlflow.entities import LoggedModelOutput

        run = self._client.get_run(self.run_id)
        if model is None:
            model = self._client.create_logged_model(
                self.experiment_id,
                model_name(step),
                source_run_id=self.run_id,
                tags={STEP_TAG: str(step)},
                params={
                    **params,
                    **run.data.params,
                },  # as MLflow's own log_model does it: models are found by what trained them
                model_type=MODEL_TYPE,
            )
        outputs = run.outputs.model_outputs if run.outputs else []
        if model.model_id not in {output.model_id for output in outputs}:
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step)])
        return model

    def _link_metrics(self, model: Any, checkpoint: Model) -> None:
        """Log the measurement's points again with the model's id; the run keeps each point once."""
        from mlflow.entities import Metric

        linked = {(metric.key, metric.step, metric.timestamp) for metric in model.metrics or []}
        metrics = [
            Metric(clean_key(key, NOT_MLFLOW), value, checkpoint.time, checkpoint.step, model_id=model.model_id)
            for key, value in checkpoint.values.items()
            if (clean_key(key, NOT_MLFLOW), checkpoint.step, checkpoint.time) not in linked
        ]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_PER_CALL])

    def _finish(self, model: Any, checkpoint: Model, weights: bool, sizes: dict[str, int]) -> None:
        """Upload the weights if they are wanted and still on the disk, and tag the model with where they are."""
        if model.tags.get(WEIGHTS_TAG) == UPLOADED:
            return
        state = self._upload(model, checkpoint, sizes) if weights else LOCAL
        self._client.finalize_logged_model(model.model_id, "READY")
        if state == UPLOADED and EXTERNAL in model.tags:
            self._client.delete_logged_model_tag(model.model_id, EXTERNAL)
        # Last, since a model that says uploaded is not looked at again.
        tags = {WEIGHTS_TAG: state} | ({} if state == UPLOADED else {EXTERNAL: "true"})
        self._client.set_logged_model_tags(model.model_id, tags)

    def _upload(self, model: Any, checkpoint: Model, sizes: dict[str, int]) -> str:
        folder = self.folder / checkpoint.path
        if not is_pipeline(folder):
            return REMOVED
        try:
            for path in pipeline_files(folder):
                self._put(model, path, f"{PIPELINE}/{path.relative_to(folder).as_posix()}", sizes)
        except FileNotFoundError:
            if folder.is_dir():
                raise
            return REMOVED  # meanwhile, by the training: its limit is more important than the upload
        with tempfile.TemporaryDirectory() as scratch:
            for path in write_model_files(Path(scratch), model, checkpoint.step):
                self._put(model, path, path.name, {})
        return UPLOADED

    def _put(self, model: Any, path: Path, to: str, sizes: dict[str, int]) -> None:
        if sizes.get(to) != path.stat().st_size:  # else an attempt whose answer was lost has brought it
            self._client.log_model_artifact(model.model_id, str(path), to.rpartition("/")[0] or None)

    def _sizes(self, model_id: str) -> dict[str, int]:
        """Sizes of the files that a model has, by path."""
        sizes: dict[str, int] = {}
        waiting: list[str | None] = [None]
        while waiting:
            for entry in self._client.list_logged_model_artifacts(model_id, waiting.pop()):
                if entry.is_dir:
                    waiting.append(entry.path)
                else:
                    sizes[entry.path] = entry.file_size
        return sizes

    def _set_roles(self, newest: int, turning: int | None) -> None:
        """Tag the newest and the turning model with their roles, and no other; a model that is both is the turning one."""
        roles = {newest: NEWEST}
        if turning is not None:
            roles[turning] = TURNING
        for model in self._search(f"tags.{ROLE_TAG} IN ('{NEWEST}', '{TURNING}')"):
            if int(model.tags[STEP_TAG]) not in roles:
                self._client.delete_logged_model_tag(model.model_id, ROLE_TAG)
        for step, role in roles.items():
            model = self._named(step)  # there is none as long as a newer one is still to be made
            if model is not None and model.tags.get(ROLE_TAG) != role:
                self._client.set_logged_model_tags(model.model_id, {ROLE_TAG: role})

"""What MLflow asks when it makes a run. Loads no torch."""

from __future__ import annotations

from mlflow.tracking.context.abstract_context import RunContextProvider

from mlflow_icr.environment import environment_tags


class ICRContext(RunContextProvider):  # type: ignore[misc]
    """Sets `environment_tags` on every run that `mlflow.start_run` makes.

    Runs that `mlflow run` makes never ask a context: a program that may be one sets the tags itself, as the trainers do.
    """

    def in_context(self) -> bool:
        """Always: versions are known everywhere."""
        return True

    def tags(self) -> dict[str, str]:
        """The tags `icr.*`."""
        return environment_tags()

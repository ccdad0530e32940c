"""The run context, which MLflow asks for tags when it makes a run. Loads no torch."""

from __future__ import annotations

from mlflow.tracking.context.abstract_context import RunContextProvider

from mlflow_icr.environment import environment_tags, is_ours


class ICRContext(RunContextProvider):  # type: ignore[misc]
    """Sets `environment_tags` on runs that this package makes; other runs do not get them.

    `mlflow run` asks no context when it makes a run: a program that it starts sets the tags itself, as the trainers do.
    """

    def in_context(self) -> bool:
        """Whether the run that is made is one of this package's."""
        return is_ours()

    def tags(self) -> dict[str, str]:
        """The tags `icr.*`."""
        return environment_tags()

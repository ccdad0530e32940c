"""The target of a run's results: server, experiment and run. It is determined once, and kept in the run folder."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

SECRET = ("pass", "token", "secret", "key")  # in the name of a part of an address's query


@dataclass(frozen=True)
class Target:
    """A tracking URI without credentials, an experiment by name or id, and the run as far as it is known.

    `given` is the run to continue; it is `inherited` if it came from MLFLOW_RUN_ID, and then a new one replaces it if it does
    not exist. `owned`: this package ends the run.
    """

    uri: str
    experiment: str = ""
    experiment_id: str = ""
    run_name: str = ""
    parent_run_id: str = ""
    given: str = ""
    inherited: bool = False
    owned: bool = True

    @staticmethod
    def of(content: dict[str, Any]) -> Target:
        """A target from its kept form."""
        return Target(**content)

    def as_dict(self) -> dict[str, Any]:
        """The form of a target to keep."""
        return asdict(self)


def absolute_uri(uri: str) -> str:
    """A tracking URI that means the same from every working folder, without a slash at its end."""
    if uri.startswith(("http://", "https://")):
        return uri.rstrip("/")
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////") and ":memory:" not in uri:
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    if "://" not in uri and uri.split(":")[0] != "databricks":
        return str(Path(uri.removeprefix("file:")).absolute())
    return uri


def public_uri(uri: str) -> str:
    """A URI without user, password, and secrets in its query."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    query = [(key, value) for key, value in parse_qsl(parts.query) if not any(word in key.lower() for word in SECRET)]
    if parts.netloc.rpartition("@")[2] == parts.netloc and len(query) == len(parse_qsl(parts.query)):
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(query)))


def with_credentials(uri: str, *known: str | None) -> str:
    """The URI with the credentials of a known one that is the same without them; absolute."""
    return next((one for one in map(absolute_uri, filter(None, known)) if public_uri(one) == uri), uri)


def resolve(
    *,
    tracking_uri: str | None,
    experiment: str | None,
    run_name: str | None,
    parent_run_id: str | None,
    run_id: str | None,
    owned: bool = True,
) -> Target:
    """The target by arguments, MLflow's settings of this process, and its environment. Asks no server."""
    import mlflow
    from mlflow.tracking import fluent

    here = absolute_uri(mlflow.get_tracking_uri())
    uri = absolute_uri(tracking_uri) if tracking_uri else here
    experiment_id = ""
    if experiment is None:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "")
        if uri == here and fluent._active_experiment_id:
            experiment, experiment_id = "", str(fluent._active_experiment_id)
        elif uri == here and not experiment:
            experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID", "")
    inherited = run_id is None and uri == here and "MLFLOW_RUN_ID" in os.environ
    if inherited:
        run_id = os.environ.pop("MLFLOW_RUN_ID")  # once, as MLflow does it: a later run of this process is another one
    return Target(
        public_uri(uri), experiment, experiment_id, run_name or "", parent_run_id or "", run_id or "", inherited, owned
    )


def run_address(uri: str, experiment_id: str, run_id: str) -> str:
    """The address of a run: its page, or its store's URI and its id."""
    if uri.startswith(("http://", "https://")):
        return f"{public_uri(uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return f"run {run_id} in {public_uri(uri)}"

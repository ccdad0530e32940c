"""Read MLflow's store exactly and in bounded memory; its errors become one line without credentials."""

from __future__ import annotations

import gc
import re
import socket
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

PROBE_SECONDS = 3.0
# A small question that a server can only answer with its database; and the ports of databases.
EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
# The largest page that MLflow's own client asks for; each page costs the store a sort, so fewer are faster.
PAGE = 25_000
# MLflow 3 has no public iterator over runs larger than this a page.
RUNS_PAGE = 1000
ENDED = {"FINISHED", "FAILED", "KILLED"}
PARENT_TAG = "mlflow.parentRunId"


class StoreError(OSError):
    """The tracking or artifact store does not answer, or refuses; the message names no credentials."""


def connect(uri: str | None = None) -> Any:
    """A client of a tracking URI, or of MLflow's own of this process. Raises StoreError for a server that does not answer now.

    The server is checked first: a call to a dead one takes MLflow four minutes, and its time-outs are settings of the process.
    """
    with answers(uri):
        import mlflow
        import requests

        if not is_answering(uri or mlflow.get_tracking_uri()):
            raise requests.ConnectionError
        return mlflow.MlflowClient(tracking_uri=uri)


def ask(uri: str, path: str) -> Any:
    """A server's answer within 3 s, asked as MLflow does it: with its credentials, certificates and headers."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    creds = get_default_host_creds(uri)
    return http_request(creds, path, "GET", timeout=PROBE_SECONDS, max_retries=0, raise_on_status=False)


def is_answering(uri: str) -> bool:
    """Whether an MLflow server or the host of a database answers within some 3 s; others are assumed to.

    An overloaded one, a proxy without its server, and a proxy's own page (for logging in) are no answers.
    """
    from mlflow.exceptions import MlflowException

    try:
        parts = urlsplit(uri)
        if parts.scheme in ("http", "https"):
            for _ in range(3):  # some fail now and then
                answer = ask(uri, EXPERIMENT)
                if answer.status_code < 500 and answer.status_code != 429:
                    return answer.status_code in (401, 403) or isinstance(answer.json(), dict)
            return False
        port = PORTS.get(parts.scheme.partition("+")[0])
        if parts.hostname and port and "," not in parts.netloc:  # else it has several hosts
            socket.create_connection((parts.hostname, parts.port or port), PROBE_SECONDS).close()
        return True
    except (MlflowException, OSError, ValueError):
        return False


def float64_bits(values: Any) -> np.ndarray:
    """The bits of values as MLflow's databases keep them: infinities as the largest number, no -0.0; (N,) int64."""
    largest = np.finfo(np.float64).max
    double = np.clip(np.asarray(values, dtype=np.float64), -largest, largest) + 0.0
    return np.where(np.isnan(double), np.nan, double).view(np.int64)


def without_credentials(text: str, uri: str = "") -> str:
    """A message without the user, password and query of a tracking URI, and without user and password of any other URI."""
    parts = urlsplit(uri)
    secrets = [parts.netloc.rpartition("@")[0], parts.password, parts.query]
    for secret in filter(None, secrets):
        for form in (secret, unquote(secret)):
            text = text.replace(form, "***")
    return re.sub(r"://[^/\s]*@", "://***@", text)


@contextmanager
def answers(uri: str | None = None) -> Iterator[None]:
    """Turn exceptions of MLflow and its transports into StoreError: one line, no credentials; `uri` if it is not MLflow's."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, requests.RequestException, SQLAlchemyError) as error:
        import mlflow

        uri = uri or mlflow.get_tracking_uri()
        lines = str(error).strip().splitlines() or [""]
        why = without_credentials(lines[0], uri)[:300]
        # A refused or unanswered connection; the rest are internals of urllib3.
        if why.startswith("API request to") or isinstance(error, (requests.ConnectionError, requests.Timeout)):
            why = "it does not answer"
        raise StoreError(f"MLFLOW_TRACKING_URI is {without_credentials(uri, uri)!r}: {type(error).__name__}: {why}") from error


def experiment_id(client: Any, name: str) -> str:
    """The id of a named experiment. Raises ValueError when there is none."""
    with answers():
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            names = [experiment.name for experiment in client.search_experiments(max_results=20)]
            raise ValueError(f"experiment is {name!r}, which the tracking store does not have; expected one of {names}")
    return str(experiment.experiment_id)


def get_run(client: Any, run_id: str) -> Any:
    """A run by its id. Raises ValueError when there is none."""
    from mlflow.exceptions import MlflowException

    with answers():
        try:
            return client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise ValueError(f"run_id is {run_id!r}, which the tracking store does not have") from None
            raise


def runs(client: Any, experiment: str, filter_string: str = "") -> Iterator[Any]:
    """Every run of an experiment's id that is not deleted, oldest first."""
    token = None
    while True:
        with answers():
            page = client.search_runs(
                [experiment], filter_string, max_results=RUNS_PAGE, order_by=["attributes.start_time ASC"], page_token=token
            )
        yield from page
        token = page.token
        if not token:
            return


def family(client: Any, run_id: str) -> Iterator[Any]:
    """A run and the runs nested in it, parents first."""
    waiting, seen = [get_run(client, run_id)], {run_id}
    while waiting:
        run = waiting.pop(0)
        yield run
        children = runs(client, run.info.experiment_id, f"tags.`{PARENT_TAG}` = '{run.info.run_id}'")
        for child in children:
            if child.info.run_id not in seen:
                seen.add(child.info.run_id)
                waiting.append(child)


def metric_page(client: Any, run_id: str, key: str, start: int) -> tuple[Sequence[Any], bool]:
    """Points of a metric from the start-th on, in the store's order, at most PAGE; and whether more follow.

    `MlflowClient.get_metric_history` reads the same pages but keeps them all; the bulk endpoints sample.
    """
    from mlflow.utils.search_utils import SearchUtils

    token = SearchUtils.create_page_token(start) if start else None
    collects = gc.isenabled()
    # The store makes some objects for each point; the collector, looking through all of them again and again, would
    # double the time of a page. It is on again between the pages, so memory stays flat.
    gc.disable()
    try:
        with answers():
            page = client._tracking_client.store.get_metric_history(run_id, key, max_results=PAGE, page_token=token)
    finally:
        if collects:
            gc.enable()
    return page, bool(page.token)


@contextmanager
def artifacts_answer() -> Iterator[None]:
    """Turn any exception of an artifact store into StoreError: each store has its own library with its own errors."""
    try:
        yield
    except Exception as error:
        raise StoreError(f"the artifact store does not answer: {type(error).__name__}") from error


def files(client: Any, run_id: str, folder: str | None = None, *, skip: Container[str] = ()) -> Iterator[Any]:
    """Every artifact file of a run, depth first, but those in folders of `skip`; one call for each folder."""
    with artifacts_answer():
        entries = client.list_artifacts(run_id, folder)
    for entry in entries:
        if not entry.is_dir:
            yield entry
        elif entry.path not in skip:
            yield from files(client, run_id, entry.path, skip=skip)


def download(client: Any, run_id: str, path: str, folder: Path) -> bytes:
    """The content of one artifact, downloaded to a temporary folder."""
    with artifacts_answer():
        local = Path(client.download_artifacts(run_id, path, str(folder)))
    try:
        return local.read_bytes()
    finally:
        if folder in local.parents:  # a local store may hand out its own file
            local.unlink()


def end_run(client: Any, run_id: str, status: str, end_time: int) -> None:
    """Set a run's status and its end, in Unix ms.

    `set_terminated` would print the run's address, with the password if the tracking URI has one; only redirecting the output
    of the whole process could prevent that.
    """
    from mlflow.entities import RunStatus

    client._tracking_client.store.update_run_info(run_id, RunStatus.from_string(status), end_time, None)


def is_alive(client: Any, run_id: str) -> bool:
    """Whether the tracking store still answers."""
    try:
        get_run(client, run_id)
    except StoreError:
        return False
    return True

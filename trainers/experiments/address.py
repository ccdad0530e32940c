"""Addresses of MLflow pages, without secrets."""

from __future__ import annotations

from urllib.parse import quote, urlsplit, urlunsplit

LOCAL_UI = "http://127.0.0.1:5000"


def without_secrets(uri: str) -> str:
    """A URI without user name, password and query."""
    parts = urlsplit(uri)
    host = parts.netloc.rsplit("@", 1)[-1]
    return urlunsplit((parts.scheme, host, parts.path, "", "")) if parts.netloc else uri.split("?", 1)[0]


def study_search(study: str) -> str:
    """The search that finds a study's runs in MLflow."""
    return f"tags.study = '{study}'"


def chart_address(tracking_uri: str, experiment_id: str, study: str, view: str | None = None) -> str:
    """The page that charts a study's runs without a click: at a server's own address, or at `make ui`'s for a local store.

    `view` is the key of a shared view, which names the charts; without one the page has all of them.
    """
    server = without_secrets(tracking_uri).rstrip("/") if tracking_uri.startswith(("http://", "https://")) else LOCAL_UI
    # The plain address of an experiment opens MLflow's GenAI overview, and nested runs stay folded up.
    shown = f"searchFilter={quote(study_search(study), safe='')}" if view is None else f"viewStateShareKey={view}"
    return f"{server}/#/experiments/{experiment_id}/runs?{shown}&workflowType=machine_learning&compareRunsMode=CHART"

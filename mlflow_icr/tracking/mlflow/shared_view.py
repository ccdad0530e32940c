"""A shared view of an experiment: MLflow's page of charts, opened on ICR, error ratio, copies and residual energy.

MLflow keeps a shared view as an experiment tag, `mlflow.sharedViewState.<key>`: JSON whose `state` is deflated JSON
in base64. An address with `viewStateShareKey=<key>` opens it. The fields are those that the page of MLflow 3.17 writes itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from mlflow_icr.monitoring.evidence import RATIOS
from mlflow_icr.tracking.mlflow.store import ask

TAG = "mlflow.sharedViewState."
OLDEST_SERVER = "3.17"  # an older page ignores the tag, and some do not know the fields
MOST_BYTES = 5000  # of an experiment tag's value, MLflow's own limit
SECTION = "icr-answer"
CARD_HEIGHT = 225  # pixels: two rows of charts fit a window of 900 below MLflow's own rows


@dataclass(frozen=True)
class Chart:
    """One line chart over images seen, named after its first key."""

    keys: tuple[str, ...]

    def card(self, place: int) -> dict[str, Any]:
        """The chart as MLflow's page describes it."""
        card: dict[str, Any] = {
            "uuid": f"{SECTION}-{place}",
            "type": "LINE",
            "runsCountToCompare": 10,
            "metricSectionId": SECTION,
            "deleted": False,
            "isGenerated": False,
            "metricKey": self.keys[0],
            "lineSmoothness": 0,
            "xAxisScaleType": "linear",
            "scaleType": "linear",
            "range": {},
            "xAxisKey": "step",
            "selectedXAxisMetricKey": "",
            "yAxisKey": "metric",
            "yAxisExpressions": [],
            "ignoreOutliers": False,
            "useGlobalXaxisKey": True,
            "useGlobalLineSmoothing": True,
        }
        return card | ({"selectedMetricKeys": list(self.keys)} if len(self.keys) > 1 else {})


def charts(ratio: str = RATIOS[0]) -> tuple[Chart, ...]:
    """The four charts; `ratio` is the error ratio that the verdict of the runs reads."""
    icr = ("repr/icr_debiased", "repr/icr_low", "repr/icr_high")
    return Chart(icr), Chart((ratio,)), Chart(("mem/ratio_l2",)), Chart(("repr/fisher_residual_energy",))


COLUMNS = ("tags.`verdict`", "metrics.`turned_at_images_seen`", "metrics.`forecast/images_seen`")


def view_key(search: str) -> str:
    """The key of a search's view: the same search has the same view."""
    return f"icr-{hashlib.sha256(search.encode()).hexdigest()[:16]}"


def view_state(search: str, title: str, ratio: str = RATIOS[0]) -> dict[str, Any]:
    """The page's state: the runs that `search` finds, and one section of charts under a title; `ratio` as in `charts`."""
    section = {"uuid": SECTION, "name": title, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}
    return {
        "searchFilter": search,
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(COLUMNS),
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "FIRST_10_RUNS",
        "compareRunCharts": [chart.card(place) for place, chart in enumerate(charts(ratio))],
        "compareRunSections": [section | {"columns": 2, "cardHeight": CARD_HEIGHT}],
        "viewMaximized": False,
        "runListHidden": True,  # the charts' legends name the runs, and need its width
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def view_tag(search: str, name: str, title: str, now: int, ratio: str = RATIOS[0]) -> tuple[str, str]:
    """Key and value of the experiment tag that keeps the view; `now` is in milliseconds, `ratio` as in `charts`.

    Raises ValueError where the value is larger than MLflow takes.
    """
    packed = base64.b64encode(zlib.compress(json.dumps(view_state(search, title, ratio)).encode(), 9)).decode()
    value = json.dumps({"name": name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"})
    if len(value) > MOST_BYTES:
        raise ValueError(f"search has {len(search)} characters and title {len(title)}; expected fewer: a view has {MOST_BYTES}")
    return TAG + view_key(search), value


def share(
    client: Any, tracking_uri: str, experiment_id: str, search: str, name: str, title: str, now: int, ratio: str = RATIOS[0]
) -> str | None:
    """Keep a view of an experiment's runs on its server; returns its key, or None where the server is too old for views.

    `client` is an MlflowClient of `tracking_uri`. Raises what MLflow raises where the server does not take the tag.
    """
    if not knows_views(server_version(tracking_uri)):
        return None
    client.set_experiment_tag(experiment_id, *view_tag(search, name, title, now, ratio))
    return view_key(search)


def newest_view(client: Any) -> tuple[str, str] | None:
    """Experiment and key of the newest view that this package made; None if there is none."""
    views = []
    for experiment in client.search_experiments():
        for tag, value in experiment.tags.items():
            if tag.startswith(f"{TAG}icr-"):
                views.append((json.loads(value).get("updatedAt", 0), experiment.experiment_id, tag.removeprefix(TAG)))
    return max(views)[1:] if views else None


def server_version(tracking_uri: str) -> str:
    """MLflow's version at a tracking server; this process's own for a store without one, empty where none is said."""
    import mlflow

    if not tracking_uri.startswith(("http://", "https://")):
        return str(mlflow.__version__)
    try:
        answer = ask(tracking_uri, "/version")
    except mlflow.MlflowException:
        return ""
    return answer.text.strip() if answer.ok else ""


def knows_views(server_version: str) -> bool:
    """Whether a server's pages open shared views as they are written here."""
    try:
        return Version(server_version).release >= Version(OLDEST_SERVER).release
    except InvalidVersion:
        return False

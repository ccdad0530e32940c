"""The view of charts that an experiment opens on: as MLflow's own page writes it, and as a browser shows it."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import pytest

from mlflow_icr.tracking.mlflow.shared_view import charts, knows_views, newest_view, share, view_key, view_tag
from tests.browser import opened
from tests.servers import Server


def test_the_tag_holds_the_charts_under_the_title() -> None:
    key, value = view_tag("tags.study = 's'", "ICR", "limited: memorizing", 7)
    assert key == "mlflow.sharedViewState." + view_key("tags.study = 's'")
    kind, packed = json.loads(value)["state"].split(";")
    assert kind == "deflate"
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert [card["metricKey"] for card in state["compareRunCharts"]] == [chart.keys[0] for chart in charts()]
    assert {card["metricSectionId"] for card in state["compareRunCharts"]} == {state["compareRunSections"][0]["uuid"]}
    assert (state["searchFilter"], state["compareRunSections"][0]["name"]) == ("tags.study = 's'", "limited: memorizing")
    with pytest.raises(ValueError, match="search has 9000 characters"):  # deflated, repetition would be small
        view_tag("".join(chr(33 + n * n % 90) + hex(n * 7919) for n in range(2000))[:9000], "ICR", "", 0)


def test_older_servers_do_not_know_views() -> None:
    assert [knows_views(version) for version in ("3.17.2", "3.18.0", "4.0.0", "3.9.0", "2.22.1", "unknown")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


@pytest.mark.usefixtures("own_store")
def test_the_newest_view_is_found() -> None:
    import mlflow

    client, uri = mlflow.MlflowClient(), mlflow.get_tracking_uri()
    assert newest_view(client) is None
    other = client.create_experiment("other")
    for experiment, search, now in (("0", "tags.study = 'a'", 5), (other, "tags.study = 'b'", 9), ("0", "tags.study = 'c'", 7)):
        share(client, uri, experiment, search, "ICR", "title", now)
    assert newest_view(client) == (other, view_key("tags.study = 'b'"))


@pytest.mark.slow
def test_a_browser_shows_four_charts_and_the_title_without_a_click(tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    server = Server(tmp_path)
    server.start()
    try:
        client = MlflowClient(server.uri)
        for name in ("limited", "control"):
            run = client.create_run("0", run_name=name, tags={"study": "s"}).info.run_id
            keys = [key for chart in charts() for key in chart.keys]
            client.log_batch(run, [Metric(key, step / 1000, 0, step) for step in range(0, 5000, 500) for key in keys])
        search = "tags.study = 's'"
        assert share(client, server.uri, "0", search, "ICR", "limited: memorizing", 0) == view_key(search)
        place = f"{server.uri}/#/experiments/0/runs?viewStateShareKey={view_key(search)}"
        with opened(f"{place}&workflowType=machine_learning&compareRunsMode=CHART", size=(1600, 900)) as visit:
            visit.page.get_by_text("limited: memorizing").wait_for(timeout=90_000)
            visit.page.wait_for_timeout(4000)
            titles = [chart.keys[0] for chart in charts()]
            boxes = [visit.page.get_by_text(title).first.bounding_box() for title in titles]
            assert all(box and 0 <= box["y"] < 900 and 0 <= box["x"] < 1600 for box in boxes), boxes
            plots = visit.page.locator(".js-plotly-plot")
            assert plots.count() == 4
            for plot in plots.all():
                box = plot.bounding_box()
                assert box["y"] + box["height"] < 900, "a chart is below the window"
                assert len(plot.locator(".scatterlayer .trace").all()) >= 2, "a chart lacks a run"
    finally:
        server.kill()

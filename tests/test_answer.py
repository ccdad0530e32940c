"""TensorBoard opens on the answer: which tags come first, what follows them to MLflow, and what a browser shows."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_icr import Report, summarise, verdict
from mlflow_icr.bridge import export_runs, import_runs
from mlflow_icr.bridge.event_folder import Folder, read_folder
from mlflow_icr.monitoring.evidence import ratio_key
from mlflow_icr.monitoring.summary import SUMMARY_KEYS
from mlflow_icr.tracking import MLflowSink, TensorBoardSink, Tracker, read_history
from mlflow_icr.tracking.tensorboard.answer import ANSWERS, answers
from tests.browser import opened
from tests.servers import free_port
from tests.test_tracking import mlflow_scalars

RUNS = Path(__file__).parents[1] / "docs" / "validation" / "runs"  # histories of whole trainings
STUDY = {"limited": "digits-limited-n64-seed1000", "control": "digits-rich-n1600-seed2000"}


def told(name: str, folder: Path, *, mlflow: bool = False) -> list[dict[str, float]]:
    """Rows of a whole training, recorded anew."""
    rows = read_history(RUNS / name)
    tracker = Tracker(folder, [TensorBoardSink(folder), *([MLflowSink()] if mlflow else [])])
    tracker.open({"seed": 0}, {})
    for row in rows:
        values = {key: value for key, value in row.items() if key != "images_seen"}
        tracker.record(Report(int(row["images_seen"]), values))
    tracker.close("FINISHED")
    return rows


def points(folder: Folder, tag: str) -> list[tuple[int, float]]:
    steps, _, values = folder.scalars[tag]
    return [(int(step), float(value)) for step, value in zip(steps, values, strict=True)]


@pytest.mark.usefixtures("own_store")
def test_the_answer_comes_first_and_goes_no_further(tmp_path: Path) -> None:
    """A run's scalars and texts, its export and its import have each value once more under `Answer/`, or not at all."""
    from mlflow import MlflowClient

    rows = told(STUDY["limited"], tmp_path / "limited", mlflow=True)
    shown = read_folder(tmp_path / "limited")
    assert sorted(shown.scalars)[: len(ANSWERS)] == sorted(ANSWERS)  # capitals first, as TensorBoard has it
    assert sorted(shown.texts)[0] == "Answer/verdict"
    assert shown.texts["Answer/verdict"][-1][2] == verdict(rows).text
    assert points(shown, "Answer/ICR") == points(shown, "repr/icr_debiased")
    assert points(shown, "Answer/copies") == points(shown, "mem/ratio_l2")
    assert points(shown, "Answer/error ratio") == points(shown, ratio_key(rows))
    once = {tag for tag, (steps, _, _) in shown.scalars.items() if len(steps) == 1}
    ends = summarise(rows) | verdict(rows).summary()
    assert once == {f"summary/{key}" for key in ends}
    assert ends.keys() <= SUMMARY_KEYS

    (run,) = MlflowClient().search_runs(["0"])
    stored = mlflow_scalars(run.info.run_id)
    assert not any(key.startswith(("Answer/", "summary/")) for key in stored)
    (exported,) = export_runs(tmp_path / "exported", run_ids=[run.info.run_id])
    again = read_folder(exported.folder)
    assert again.scalars.keys() >= {*ANSWERS, *once}
    assert all(points(again, tag) == points(shown, tag) for tag in ANSWERS)
    for name, folder in (("ours", tmp_path / "limited"), ("exported", exported.folder)):
        (imported,) = import_runs(folder, name)
        assert mlflow_scalars(imported.run_id).keys() == stored.keys()


def test_hparams_hold_the_summary_and_no_chart_of_one_point_is_in_front(tmp_path: Path) -> None:
    """As TensorBoard's own plugin reads them."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    rows = told(STUDY["limited"], tmp_path / "limited")
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    assert list(multiplexer.Runs()) == ["limited"]  # no second run for the summary
    request, provider = RequestContext(), MultiplexerDataProvider(multiplexer, str(tmp_path))
    tags = provider.list_scalars(request, experiment_id="", plugin_name="scalars")["limited"]
    once = [place for place, tag in enumerate(sorted(tags)) if len(multiplexer.Tensors("limited", tag)) == 1]
    assert once == list(range(len(tags) - len(once), len(tags)))  # behind all curves
    context = backend_context.Context(TBContext(data_provider=provider))
    states = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING]
    content = context.hparams_metadata(request, "")
    experiment = context.experiment_from_metadata(request, "", True, content, [])
    names = {info.name.tag for info in experiment.metric_infos}
    # The plugin takes each scalar of a run as a metric: a list of metrics would be taken for those of all runs.
    assert names == set(tags)
    asked = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=5, allowed_statuses=states)
    found = list_session_groups.Handler(request, context, "", asked).run()
    (group,) = found.session_groups
    shown = {one.name.tag: one.value for one in group.metric_values}
    ends = summarise(rows) | verdict(rows).summary()
    assert {tag: shown[tag] for tag in shown if tag.startswith("summary/")} == pytest.approx(
        {f"summary/{key}": value for key, value in ends.items()}
    )


def test_the_far_ratio_is_the_answer_where_there_is_one() -> None:
    row = {"repr/view_error_ratio": 1.5, "repr/far_error_ratio": 4.0, "repr/icr": 0.3, "images_seen": 1.0}
    assert answers(row) == {"Answer/ICR": 0.3, "Answer/error ratio": 4.0}
    assert answers({"repr/view_error_ratio": 1.5}) == {"Answer/error ratio": 1.5}
    near = {"repr/view_error_ratio": 1.5, "repr/near_error_ratio": 1.5, "repr/view_excess": 0.2}
    assert answers(near) == {"Answer/view excess": 0.2}
    assert [ratio_key([found]) for found in (row, near, {"repr/view_error_ratio": 1.5})] == [
        "repr/far_error_ratio", "repr/view_excess", "repr/view_error_ratio",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """TensorBoard's address, on a folder of the runs `limited` and `control`."""
    folder, port = tmp_path_factory.mktemp("study"), free_port()
    for role, name in STUDY.items():
        told(name, folder / role)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port), "--host", "127.0.0.1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline, address = time.monotonic() + 120, f"http://127.0.0.1:{port}"
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{address}/data/runs", timeout=5) as answer:
                    if b"control" in answer.read():
                        break
            except OSError:
                pass
            time.sleep(0.3)
        yield address
    finally:
        server.kill()
        server.wait()


def in_view(place: Any, size: tuple[int, int]) -> bool:
    """Whether all of an element is in the window."""
    box = place.bounding_box()
    return bool(
        box and box["x"] >= 0 and box["y"] >= 0 and box["x"] + box["width"] <= size[0] and box["y"] + box["height"] <= size[1]
    )


@pytest.mark.slow
def test_a_browser_shows_icr_and_copies_without_a_click(board: str) -> None:
    size = (1600, 900)
    with opened(board, size=size) as visit:
        cards = visit.page.locator("scalar-card")
        cards.nth(3).wait_for(timeout=90_000)
        cards.nth(1).get_by_text("limited").wait_for(timeout=90_000)  # the table below a chart, with the last values
        titles = ["".join(card.locator(".tag").first.inner_text().split()) for card in cards.all()]
        assert titles[:4] == ["".join(tag.split()) for tag in ANSWERS]
        for card in cards.all()[:2]:
            assert in_view(card, size)
            assert all(run in card.inner_text() for run in STUDY)
        for run in STUDY:  # by a short name
            assert in_view(visit.page.get_by_text(run, exact=True).first, size)
    with opened(f"{board}/#text", size=size) as visit:
        for state in ("generalizing", "turning"):  # of both runs, the newest text first
            said = visit.page.get_by_text(state, exact=True).first
            said.wait_for(timeout=90_000)
            assert in_view(said, size)

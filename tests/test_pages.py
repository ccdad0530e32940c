"""What somebody sees who opens MLflow and TensorBoard on our runs, in a real browser; slow, for servers and pages take time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_icr.tracking import read_history
from tests.browser import opened
from tests.servers import Server, free_port
from tests.training import run

pytestmark = pytest.mark.slow
PATIENCE = 90_000  # milliseconds


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """Addresses of MLflow and TensorBoard, and the folder of the runs `first` and `second` that they show."""
    folder = tmp_path_factory.mktemp("site")
    server = Server(folder)
    server.start()
    port = free_port()
    board = None
    try:
        for name, seed in (("first", 0), ("second", 1)):
            environment = os.environ | {"MLFLOW_TRACKING_URI": server.uri}
            done = run(folder / "runs" / name, f"--seed={seed}", f"--run-name={name}", env=environment)
            assert done.returncode == 0, done.stderr
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder / "runs"), "--port", str(port)]
        command += ["--host", "127.0.0.1", "--load_fast", "false"]
        board = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(address, timeout=5):
                    break
            except OSError:
                time.sleep(0.3)
        yield server.uri, address, folder / "runs"
    finally:
        server.kill()
        if board is not None:
            board.kill()
            board.wait()


def run_id(folder: Path, name: str) -> str:
    return str(json.loads((folder / name / "mlflow.json").read_text())["run_id"])


def seen(page: Any, text: str) -> None:
    page.get_by_text(text).first.wait_for(timeout=PATIENCE)


def test_mlflow_lists_and_sorts_runs(site: tuple[str, str, Path]) -> None:
    mlflow, _, folder = site
    lowest = {name: min(row["repr/icr"] for row in read_history(folder / name)) for name in ("first", "second")}
    for ascending in ("true", "false"):
        order = f"orderByKey=metrics.%60icr_min%60&orderByAsc={ascending}"
        with opened(f"{mlflow}/#/experiments/0/runs?{order}&compareRunsMode=TABLE", size=(1600, 900)) as visit:
            for name in lowest:
                seen(visit.page, name)
            visit.page.wait_for_timeout(3000)
            places = {name: visit.page.get_by_text(name, exact=True).first.bounding_box()["y"] for name in lowest}
            above = sorted(places, key=lambda name: places[name])
            assert above == sorted(lowest, key=lambda name: lowest[name], reverse=ascending == "false")


def test_mlflow_compares_runs(site: tuple[str, str, Path]) -> None:
    mlflow, _, folder = site
    ids = json.dumps([run_id(folder, "first"), run_id(folder, "second")])
    with opened(f'{mlflow}/#/compare-runs?runs={ids}&experiments=["0"]', size=(1600, 1200)) as visit:
        seen(visit.page, "Comparing 2 Runs from 1 Experiment")
        seen(visit.page, "protocol_digest")


def test_mlflow_shows_a_run_with_its_report_images_and_models(site: tuple[str, str, Path]) -> None:
    mlflow, _, folder = site
    place = f"{mlflow}/#/experiments/0/runs/{run_id(folder, 'first')}"
    with opened(place, size=(1400, 1000)) as visit:
        seen(visit.page, "checkpoint-000000001216")  # among the run's logged models
        seen(visit.page, "icr_min")
    with opened(f"{place}/artifacts/report/index.html", size=(1400, 1000)) as visit:
        visit.page.frame_locator("iframe").get_by_text("How this was computed").wait_for(timeout=PATIENCE)
    with opened(f"{place}/model-metrics", size=(1400, 1600)) as visit:
        visit.page.get_by_placeholder("Search metric charts").fill("repr/icr")
        seen(visit.page, "repr/icr_low")
    with opened(f"{place}/artifacts", size=(1400, 1000)) as visit:
        for name in ("images", "figures", "tables", "report"):
            seen(visit.page, name)
    with opened(f"{mlflow}/#/experiments/0/models", size=(1600, 1000)) as visit:
        for step in ("000000000000", "000000000320", "000000000608", "000000001216"):
            seen(visit.page, f"checkpoint-{step}")


def test_tensorboard_shows_its_pages(site: tuple[str, str, Path]) -> None:
    _, board, _ = site
    with opened(f"{board}/#custom_scalars", size=(1400, 1000)) as visit:
        seen(visit.page, "ICR and copies")
        seen(visit.page, "ICR, debiased, with its 95 % interval")
        seen(visit.page, "Matches (4)")  # ICR and copies of both runs in one chart
    with opened(f"{board}/#images", size=(1400, 1000)) as visit:
        seen(visit.page, "samples")
        visit.page.locator("tf-image-loader img").first.wait_for(timeout=PATIENCE)
        source = visit.page.locator("tf-image-loader img").first.get_attribute("src")
        assert source
    with opened(f"{board}/#hparams", size=(1400, 1000)) as visit:
        for words in ("first", "second", "batch_size"):
            visit.page.locator(f"text={words}").first.wait_for(timeout=PATIENCE)
    with opened(f"{board}/#projector", size=(1400, 1000)) as visit:
        inner = visit.page.frame_locator("iframe").frame_locator("iframe")
        inner.get_by_text("Points: 32").first.wait_for(timeout=PATIENCE)  # images

"""The pictures in README.md and docs, from the newest study in `outputs/`: its figure and report, MLflow UI and TensorBoard.

Starts both servers on free ports, opens the address that the study printed in headless Chromium, and saves the page. Fails when
a page does not show the curves.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path

from mlflow import MlflowClient
from playwright.sync_api import Page, sync_playwright

from mlflow_icr.tracking.mlflow.shared_view import newest_view
from trainers.experiments.address import chart_address
from trainers.experiments.ui import newest_study, start, stop

PICTURES = Path(__file__).parent / "images"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shoot_mlflow(page: Page, port: int, study: str, experiment_id: str) -> None:
    """The page that the study prints."""
    newest = newest_view(MlflowClient(f"http://127.0.0.1:{port}"))
    view = None if newest is None or newest[0] != experiment_id else newest[1]
    page.set_viewport_size({"width": 1400, "height": 860})
    address = chart_address("sqlite:///mlflow.db", experiment_id, study, view)
    page.goto(address.replace("127.0.0.1:5000", f"127.0.0.1:{port}"))
    page.locator(".js-plotly-plot").nth(3).wait_for(timeout=240_000)
    assistant = page.get_by_text("MLflow Assistant").first
    if assistant.is_visible():
        assistant.locator("xpath=ancestor::div[.//button][1]").get_by_role("button").last.click()
    page.wait_for_timeout(6000)  # the charts draw themselves in
    page.screenshot(path=PICTURES / "mlflow.png")


def shoot_tensorboard(page: Page, port: int) -> None:
    """The page that `make ui` prints."""
    page.set_viewport_size({"width": 1400, "height": 700})
    page.goto(f"http://127.0.0.1:{port}/?smoothing=0")
    page.locator("scalar-card").nth(1).get_by_text("limited").wait_for(timeout=240_000)
    page.wait_for_timeout(10_000)
    page.screenshot(path=PICTURES / "tensorboard.png")


def shoot_models(page: Page, port: int, experiment_id: str) -> None:
    """The experiment's models: checkpoints with their metrics."""
    page.set_viewport_size({"width": 2000, "height": 620})
    page.goto(f"http://127.0.0.1:{port}/#/experiments/{experiment_id}/models?workflowType=machine_learning")
    page.get_by_text("checkpoint-0").first.wait_for(timeout=90_000)
    page.get_by_text("repr/icr").first.wait_for(timeout=30_000)  # the metrics of each
    page.wait_for_timeout(3000)
    page.screenshot(path=PICTURES / "models.png")


def shoot_custom_scalars(page: Page, port: int) -> None:
    """ICR with its interval, and copies."""
    page.set_viewport_size({"width": 1400, "height": 620})
    page.goto(f"http://127.0.0.1:{port}/#custom_scalars")
    page.get_by_text("ICR, debiased, with its 95 % interval").first.wait_for(timeout=90_000)
    page.get_by_text("Ignore outliers in chart scaling").first.click()  # the ends of the curves among them
    page.wait_for_timeout(5000)
    page.screenshot(path=PICTURES / "custom-scalars.png")


def shoot_report(page: Page, folder: Path) -> None:
    """The top of the study's report."""
    page.set_viewport_size({"width": 1100, "height": 1300})
    page.goto((folder / "report" / "index.html").resolve().as_uri())
    page.get_by_text("How this was computed").first.wait_for(timeout=30_000)
    page.screenshot(path=PICTURES / "report.png")


def main() -> None:
    folder = newest_study(Path("outputs"))
    if not (folder / "study.png").exists():
        sys.exit("there is no finished study in outputs/; run make demo first")
    place = json.loads((folder / "limited" / "mlflow.json").read_text())
    PICTURES.mkdir(exist_ok=True)
    shutil.copyfile(folder / "study.png", PICTURES / "study.png")
    mlflow_port, tensorboard_port = free_port(), free_port()
    servers = start(folder, mlflow_port, tensorboard_port)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
            page = browser.new_page()
            shoot_mlflow(page, mlflow_port, folder.name, place["experiment_id"])
            shoot_models(page, mlflow_port, place["experiment_id"])
            shoot_tensorboard(page, tensorboard_port)
            shoot_custom_scalars(page, tensorboard_port)
            shoot_report(page, folder)
            browser.close()
    finally:
        stop(servers)
    print(*sorted(PICTURES.iterdir()), sep="\n")


if __name__ == "__main__":
    main()

"""The verdict on a run: its folder, its measurements image by image, and a training that stops on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mlflow_icr import EDMDenoiser, ICRMonitor, Protocol, compare, verdict
from mlflow_icr.cli import main
from mlflow_icr.tracking import Tracker
from tests.test_verdict import history, samples
from tests.training import errors_of, process_as_it_was
from trainers import train


def test_folders_files_and_rows_are_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | samples(ratio=0.3, ct=-4) for row in history(0.3, 1.6)]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert verdict(tmp_path) == verdict(str(tmp_path / "history.jsonl")) == verdict(rows)
    assert main(["verdict", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("memorizing since ")
    assert "\nturned at " in said
    assert "checkpoint to keep" in said
    assert main(["verdict", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "memorizing"
    assert main(["verdict", str(tmp_path / "none")]) == 2


def test_two_measurements_are_compared_image_by_image(
    small_unet: nn.Module, digits: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import copy

    network = copy.deepcopy(small_unet)
    monitor = ICRMonitor(EDMDenoiser(network), digits, Protocol(num_views=6))
    tracker = Tracker(tmp_path, [])
    tracker.open({}, {})
    reports = []
    for step in (10, 20):
        reports.append(monitor.measure(step))
        tracker.record(reports[-1])
        with torch.no_grad():
            network.conv_in.weight.mul_(1.3)
    found = compare(10, 20, folder=tmp_path)
    a, b = (report.values["repr/icr_debiased"] for report in reports)
    assert found.difference == pytest.approx(b - a, abs=1e-12)
    assert found.low < found.difference < found.high
    width = reports[0].values["repr/icr_high"] - reports[0].values["repr/icr_low"]
    assert found.high - found.low < 0.5 * width
    mine = monitor.compare(10, 20)
    assert (mine.low, mine.high) == pytest.approx((found.low, found.high), abs=1e-9)
    if b > a:  # then the second step's rise over the lowest is this difference
        assert reports[1].values["repr/icr_rise_low"] == pytest.approx(found.low, abs=1e-6)
    back = compare(20, 10, folder=tmp_path)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    assert main(["compare", str(tmp_path), "10", "20"]) == 0
    assert json.loads(capsys.readouterr().out)["low"] == found.low
    assert main(["compare", str(tmp_path), "10", "30"]) == 2
    assert "step_b is 30; expected a measurement with repr/icr_debiased: 10, 20" in capsys.readouterr().err
    with pytest.raises(ValueError, match="step_a is 5; expected a step that was measured with an interval: 10, 20"):
        monitor.compare(5, 20)


def test_training_stops_on_a_turn_and_marks_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real training on 16 images, which a network knows by heart within seconds."""
    from mlflow import MlflowClient

    flags = [
        "--preset=digits", "--num-images=16", "--total-kimg=30", "--measurements=12",
        "--block-channels=16,32", "--num-samples=8", "--sample-steps=4", "--first-measurement-kimg=1", "--stop-on=turning",
        "--learning-rate=3e-3", "--num-heldout=16", "--checkpoints-total-limit=1", f"--output-dir={tmp_path / 'run'}",
    ]  # fmt: skip
    with process_as_it_was(), errors_of(64):
        assert train.main(flags) == 0
    said = capsys.readouterr().out
    assert "stops: turning" in said or "stops: memorizing" in said
    found = verdict(tmp_path / "run")
    assert found.state in ("turning", "memorizing")
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["images_seen"] < 30_000
    assert verdict(rows[:-1]).state in ("generalizing", "undecided")  # it ended with the first measurement that said so
    marked = json.loads((tmp_path / "run" / "checkpoints" / "turning.json").read_text())
    assert marked["checkpoint_images_seen"] == found.checkpoint_images_seen
    assert (tmp_path / "run" / "checkpoints" / marked["checkpoint"] / "unet").is_dir()  # whatever the limit
    assert len(list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))) <= 4 < len(rows)
    run_id = json.loads((tmp_path / "run" / "mlflow.json").read_text())["run_id"]
    models = MlflowClient().search_logged_models(["0"], f"source_run_id = '{run_id}'")
    assert {m.name for m in models} == {f"checkpoint-{row['images_seen']:012d}" for row in rows}
    roles = {m.name.removeprefix("checkpoint-"): m.tags["role"] for m in models if "role" in m.tags}
    assert roles == {f"{rows[-1]['images_seen']:012d}": "newest"} | {marked["checkpoint"]: "turning"}
    assert "verdict: " in said

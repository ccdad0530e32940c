"""The verdict on histories whose answer is known, and on real ones."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mlflow_icr import EDMDenoiser, ICRMonitor, Protocol, compare, verdict
from mlflow_icr.cli import main
from mlflow_icr.monitoring.verdict import Thresholds, elasticities
from mlflow_icr.tracking import Tracker

STEPS = [0, *(round(2000 * 1.25**i) for i in range(18))]
TURN = 20_000


def history(
    early: float, late: float, icr_rise: float = 0.0, half_width: float = 0.05, wobble: float = 0.0
) -> list[dict[str, float]]:
    """View error ratio growing with one power of images seen up to TURN and with another after it; ICR falling, then rising."""
    rng = np.random.default_rng(3)
    rows, lowest = [], math.inf
    for step in STEPS:
        x = max(step, 1000)
        ratio = (min(x, TURN) / 1000) ** early * max(1.0, x / TURN) ** late * math.exp(wobble * rng.standard_normal())
        icr = 0.85 - 0.15 * min(1.0, math.log(x / 1000) / math.log(TURN / 1000)) + icr_rise * max(0.0, math.log(x / TURN))
        lowest = min(lowest, icr)
        rows.append(
            {
                "images_seen": step,
                "repr/icr": icr,
                "repr/icr_debiased": icr,
                "repr/icr_rise": icr - lowest,
                "repr/icr_rise_low": icr - lowest - 0.008,
                "repr/view_error_ratio": ratio,
                "repr/view_error_ratio_low": ratio * math.exp(-half_width),
                "repr/view_error_ratio_high": ratio * math.exp(half_width),
                "repr/trace_residual": 0.03 * max(1.0, x / TURN),
                "repr/trace_invariant": 0.02 * max(1.0, x / TURN) ** 0.3,
                "repr/fisher_residual_energy": 1e-5 * max(1.0, x / TURN) ** 2,
            }
        )
    return rows


def without(rows: list[dict[str, float]], *parts: str) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not any(part in k for part in parts)} for row in rows]


def test_a_slope_is_the_power_of_images_seen() -> None:
    slopes = elasticities(history(0.3, 0.3))
    assert [s.value for s in slopes] == pytest.approx([0.3] * len(slopes))
    assert all(s.low < 0.3 < s.high for s in slopes)
    # The first one needs a doubling of images seen: 2000 x 1.25^4 is more than 4000.
    assert slopes[0].images_seen == STEPS[5]
    # Half-widths add up in squares: x at 0 and 1.12 with half-width h would give h sqrt(2) / 1.12.
    narrow = elasticities(history(0.3, 0.3, half_width=0.01))
    assert [s.high - s.value for s in slopes] == pytest.approx([5 * (s.high - s.value) for s in narrow])


def test_a_model_that_generalizes_and_one_that_turns() -> None:
    rich = verdict(history(0.25, 0.25, wobble=0.01))
    assert rich.state == "generalizing"
    assert (rich.turning_images_seen, rich.low, rich.high) == (None, None, None)
    assert rich.checkpoint_images_seen == STEPS[-1]
    assert "power 0.2" in rich.evidence[0]

    rows = history(0.3, 1.6)
    states = [verdict(rows[: n + 1]).state for n in range(len(rows))]
    assert states[:4] == ["undecided"] * 4
    turned = states.index("turning")
    assert set(states[5:turned]) <= {"generalizing", "undecided"}
    assert states[turned:] == sorted(states[turned:], reverse=True)  # turning, then memorizing, and never back
    assert states[-1] == "memorizing"
    found = verdict(rows)
    assert found.low is not None
    assert found.high is not None
    assert found.turning_images_seen is not None
    assert found.low <= TURN <= found.high
    assert found.low <= found.turning_images_seen <= found.high <= TURN * 2
    assert found.checkpoint_images_seen in STEPS
    assert found.checkpoint_images_seen <= found.turning_images_seen
    # What later measurements say does not move a turn that is past.
    assert verdict(rows[: turned + 3]).turning_images_seen == found.turning_images_seen


def test_a_doubtful_turn_is_undecided() -> None:
    assert verdict(history(0.3, 0.8, half_width=0.6)).state == "undecided"
    assert verdict(history(0.3, 0.8, half_width=0.02)).state in ("turning", "memorizing")


def test_icr_alone_is_enough_where_it_rises_far_and_surely() -> None:
    rows = without(history(0.3, 1.6, icr_rise=0.075), "view_error")
    found = verdict(rows)
    assert found.state == "memorizing"  # a rise of more than twice the threshold, Fisher energy 12 times its value
    lowest = min(rows[1:], key=lambda row: row["repr/icr_debiased"])["images_seen"]
    assert found.turning_images_seen == lowest
    assert found.low <= lowest <= found.high  # type: ignore[operator]
    assert "ICR rose by" in found.evidence[0]
    creeping = without(history(0.3, 1.6, icr_rise=0.02), "view_error")
    assert verdict(creeping).state == "generalizing"
    # An ICR that rises while the invariant energy keeps up is not a turn.
    kept_up = [row | {"repr/trace_invariant": row["repr/trace_residual"]} for row in rows]
    assert verdict(kept_up).state == "generalizing"
    # Without intervals a rise must last; with wide ones it is in doubt.
    plain = without(rows, "debiased", "rise")
    assert verdict(plain).state == "memorizing"
    assert verdict(plain).evidence[-1].startswith("ICR (plug-in)")
    doubt = [row | {"repr/icr_rise_low": -0.01} for row in rows]
    assert verdict(doubt).state == "undecided"
    unpaired = [row | {"repr/icr_low": row["repr/icr"] - 0.2, "repr/icr_high": row["repr/icr"] + 0.2} for row in plain]
    assert verdict(unpaired).state == "undecided"


def test_it_reads_nothing_but_the_representation() -> None:
    rows = history(0.3, 1.6)
    more = [row | {"mem/ratio_l2": 1.0, "loss/gap": 5.0, "gen/fd_pixels": 0.1} for row in rows]
    assert verdict(more) == verdict(rows)
    assert verdict([{"images_seen": s, "mem/ratio_l2": 1.0} for s in STEPS]).state == "undecided"
    assert verdict([]).checkpoint_images_seen is None
    # A row written twice, or out of order, counts once.
    assert verdict([*rows[5:], *rows[:5], rows[7]]) == verdict(rows)
    assert verdict(rows, Thresholds(elasticity=5, rise=1)).state == "generalizing"


def test_folders_files_and_rows_are_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = history(0.3, 1.6)
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert verdict(tmp_path) == verdict(str(tmp_path / "history.jsonl")) == verdict(rows)
    assert main(["verdict", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("memorizing\nturned at")
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


def test_training_stops_on_a_turn_and_marks_its_checkpoint(tmp_path: Path) -> None:
    """A real training on 16 images, which a network knows by heart within seconds."""
    from mlflow import MlflowClient

    command = [
        sys.executable, "-m", "trainers.train", "--preset=digits", "--num-images=16", "--total-kimg=30", "--measurements=16",
        "--block-channels=16,32", "--num-samples=8", "--sample-steps=4", "--first-measurement-kimg=1", "--stop-on=turning",
        "--learning-rate=3e-3", "--num-heldout=16", "--checkpoints-total-limit=1", f"--output-dir={tmp_path / 'run'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "stops: turning" in done.stdout or "stops: memorizing" in done.stdout
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
    assert "verdict: " in done.stdout

"""Whatever is reported is the same in the journal, in MLflow and in TensorBoard: random reports, odd floats, any script."""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from mlflow_icr import Report
from mlflow_icr.tracking import MLflowSink, TensorBoardSink, Tracker
from mlflow_icr.tracking.tensorboard.custom_scalars import OVERLAY
from tests.test_tracking import as_float32, journal_scalars, mlflow_scalars, tensorboard_scalars

SCRIPTS = ["héllo wörld", "名前とタグ", "שלום", "🧪🔬", "tab\tand\nline", "Ωμέγα", "'\"\\ <b>&amp;", "a" * 240]
KEYS = [
    "repr/icr",
    "repr/icr_debiased",
    "mem/ratio_l2",
    "mem/ratio_l2_low",
    "gen/größe",
    "perf/Скорость",
    "loss/train eval",
    "x.y-z_1",
    "指標",
]


def odd_float(chance: random.Random) -> float:
    """Any finite float64, by its bits: subnormal, huge, of a zero's sign, or an ordinary number of full length."""
    value = struct.unpack("<d", chance.randbytes(8))[0]
    if not math.isfinite(value):
        return chance.choice([5e-324, -0.0, 1.7976931348623157e308, 2.0**53 + 1])
    return float(value) if chance.random() < 0.5 else chance.uniform(-1, 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore:overflow encountered")  # a float64 may be no float32
def test_random_reports_are_the_same_in_three_places(seed: int, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    chance = random.Random(seed)
    params = {f"p{i} {chance.choice(['é', 'ß', '字'])}": chance.choice(SCRIPTS) for i in range(5)}
    tags = {f"t{i}.{chance.choice(['é', 'ß', '字'])}": chance.choice(SCRIPTS) for i in range(5)}
    sink, board = MLflowSink(run_name=chance.choice(SCRIPTS[:4])), TensorBoardSink(tmp_path / "tensorboard")
    tracker = Tracker(tmp_path, [sink, board])
    tracker.open(params, tags)
    steps = sorted(chance.sample(range(10**9), 6))
    absent = {}
    for step in steps:
        values = {key: odd_float(chance) for key in KEYS if chance.random() < 0.7}
        absent = {"gen/fd_pixels": chance.choice(SCRIPTS)}
        picture = np.frombuffer(chance.randbytes(8 * 9 * 3), np.uint8).reshape(8, 9, 3)
        tracker.record(Report(step, values, {"Bild/größe": picture}, absent, "digest"))
    tracker.flush_local()
    assert sink.flush()
    board.flush()
    assert sink.run_id is not None
    journal = journal_scalars(tmp_path)
    assert mlflow_scalars(sink.run_id) == journal
    shown = tensorboard_scalars(tmp_path / "tensorboard")
    assert {key: points for key, points in shown.items() if key not in OVERLAY} == as_float32(journal)
    run = MlflowClient().get_run(sink.run_id)
    assert {key: run.data.params[key] for key in params} == params
    assert {key: run.data.tags[key] for key in tags} == tags
    assert run.data.tags["absent.gen/fd_pixels"] == absent["gen/fd_pixels"]
    names = [file.path for file in MlflowClient().list_artifacts(sink.run_id, "images")]
    assert len([name for name in names if name.startswith("images/Bild~gr__e") and name.endswith(".png")]) == len(steps)
    assert len(json.loads((tmp_path / "mlflow.json").read_text())["refused"]) == 0
    tracker.close("FINISHED")

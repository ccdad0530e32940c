"""What a run folder is worth: rows at the same cost, catching up in few calls, earlier formats, other places."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlflow_icr import Report
from mlflow_icr.cli import main
from mlflow_icr.tracking import MLflowSink, TensorBoardSink, Tracker
from tests.stores import mlflow_state
from tests.test_tracking import mlflow_scalars, report, tensorboard_scalars

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("quick_attempts")


def test_nothing_that_is_done_for_a_row_grows_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict reads a row once, and no event file is read, at whatever row and resumption."""
    from mlflow_icr.monitoring.verdict import VerdictTracker
    from mlflow_icr.tracking.tensorboard import event_file

    judged: list[int] = []
    real = VerdictTracker.add

    def noted(self: VerdictTracker, row: Any) -> Any:
        judged.append(row["images_seen"])
        return real(self, row)

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("an event file is read")

    monkeypatch.setattr(VerdictTracker, "add", noted)
    monkeypatch.setattr(event_file, "events", refuse)
    for first in (0, 50):
        tracker = Tracker(tmp_path, [TensorBoardSink(tmp_path / "tensorboard")], resume="allow")
        tracker.open({}, {})
        for step in range(first, first + 50):
            tracker.record(Report(step, {"repr/icr": 0.5, "repr/icr_debiased": 0.5, "mem/ratio_l2": 0.1}))
        assert tracker.flush()
        tracker.abandon()
    assert judged == [*range(50), *range(100)]  # a row once, and those of before once more when the folder is opened
    shown = tensorboard_scalars(tmp_path / "tensorboard")
    assert [step for step, _ in shown["repr/icr"]] == [step for step, _ in shown["overlay/copies"]] == list(range(100))


def test_catching_up_takes_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    tracker = Tracker(tmp_path, [], mode="disabled")
    for step in range(300):
        tracker.record(Report(step, {"repr/icr": 0.5}))
    tracker.abandon()
    calls: list[int] = []
    real = MlflowClient.log_batch

    def counted(self: MlflowClient, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return real(self, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    assert main(["sync", str(tmp_path)]) == 0
    assert len(calls) < 6
    assert len(mlflow_scalars(mlflow_state(tmp_path)["run_id"])["repr/icr"]) == 300


def test_pictures_with_slashes_are_told_again(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    picture = np.full((4, 4, 3), 9, np.uint8)
    tracker = Tracker(tmp_path, [])
    tracker.journal.append(Report(5, {"repr/icr": 0.5}, {"a/b": picture, "../c": picture}))
    tracker.abandon()  # before the log had it
    assert not (tmp_path.parent / "c").exists()
    assert main(["sync", str(tmp_path)]) == 0
    names = [file.path for file in MlflowClient().list_artifacts(mlflow_state(tmp_path)["run_id"], "images")]
    assert len([name for name in names if name.startswith("images/a~b") and name.endswith(".png")]) == 1


def test_an_earlier_folder_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its outbox, half of it delivered; values of its own; and TensorBoard's files, which hold other points."""
    from mlflow import MlflowClient
    from torch.utils.tensorboard import SummaryWriter

    client = MlflowClient()
    run_id = client.create_run("0").info.run_id
    client.log_metric(run_id, "repr/icr", 0.5, timestamp=1000, step=0)
    client.log_metric(run_id, "loss", 3.0, timestamp=2000, step=7)
    told = [
        {"kind": "start", "run_id": None, "name": "early", "running": True, "params": {"seed": "1"}, "tags": {"study": "s"}},
        {"kind": "metrics", "step": 0, "time": 1000, "values": {"repr/icr": 0.5}},
        {"kind": "points", "points": [["loss", 3.0, 7, 2000]]},
        {"kind": "metrics", "step": 10, "time": 3000, "values": {"repr/icr": 0.25}},
        {"kind": "table", "to": "tables/t.json", "content": {"columns": ["a"], "data": [[1]]}, "marks": "[]"},
    ]
    (tmp_path / "mlflow.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told))
    kept = {"run_id": run_id, "experiment_id": "0", "acknowledged": 3, "refused": {}, "key": "k"}
    (tmp_path / "mlflow.json").write_text(json.dumps(kept))
    rows = [{"images_seen": 0, "repr/icr": 0.5}, {"images_seen": 10, "repr/icr": 0.25}, {"images_seen": 20, "repr/icr": 0.125}]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "logged").mkdir()
    (tmp_path / "logged" / "values.jsonl").write_text(json.dumps({"step": 7, "time": 2.0, "values": {"loss": 3.0}}) + "\n")
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        writer.add_scalar("repr/icr", 0.5, 0)
    time.sleep(1.1)  # event files are read in the order of their names, which are of seconds
    assert main(["sync", str(tmp_path)]) == 0
    with Tracker(tmp_path, [MLflowSink(), TensorBoardSink(tmp_path / "tensorboard")], resume="must") as tracker:
        tracker.open({"seed": "1"}, {})
        tracker.record(Report(30, {"repr/icr": 0.0625}))
        assert tracker.run_id == run_id
    points = [(step, 0.5 / 2 ** (step // 10)) for step in (0, 10, 20, 30)]
    stored = mlflow_scalars(run_id)
    assert (stored["repr/icr"], stored["loss"]) == (points, [(7, 3.0)])
    found = client.get_run(run_id)
    assert (found.info.status, found.data.params["seed"]) == ("FINISHED", "1")
    assert [file.path for file in client.list_artifacts(run_id, "tables")] == ["tables/t.json"]
    from tests.test_restarts import in_both_readers

    shown = in_both_readers(tmp_path / "tensorboard")
    assert (shown["repr/icr"], shown["loss"]) == (points, [(7, 3.0)])


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for Weights & Biases, which notes what it is told."""
    import types

    told: list[tuple[Any, ...]] = []

    class Run:
        id = "run1"
        config = types.SimpleNamespace(update=lambda values, **options: told.append(("config", dict(values))))
        summary = types.SimpleNamespace(update=lambda values: told.append(("summary", dict(values))))

        def log(self, values: Mapping[str, Any]) -> None:
            told.append(("log", {key: str(value) if not isinstance(value, float) else value for key, value in values.items()}))

        def define_metric(self, *arguments: Any, **options: Any) -> None: ...

        def save(self, path: str, **options: Any) -> None:
            told.append(("save", Path(path).name))

        def finish(self, exit_code: int = 0) -> None:
            told.append(("finish", exit_code))

    stub = types.ModuleType("wandb")
    stub.init = lambda **options: told.append(("init", options)) or Run()  # type: ignore[attr-defined, func-returns-value]
    stub.Image = lambda path: f"Image({Path(path).name})"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return told


def test_the_documented_sink_works(tmp_path: Path, wandb: list[tuple[Any, ...]]) -> None:
    page = (ROOT / "docs" / "built" / "tracking.md").read_text()
    code = page.split('```python title="wandb_sink.py"\n')[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    for step in (1, 2):  # the second time is a resumption
        tracker = Tracker(tmp_path / "run", [names["WandbSink"](project="p")], resume="allow")
        tracker.open({"seed": 3}, {"study": "s"})
        tracker.record(report(step))
        tracker.flush_local()
        if step == 1:
            tracker.abandon()
    tracker.close("FAILED")
    assert [call[0] for call in wandb if call[0] in ("init", "finish")] == ["init", "init", "finish"]
    assert ("config", {"seed": 3}) in wandb
    logged = [call[1] for call in wandb if call[0] == "log"]
    assert [values["images_seen"] for values in logged if "repr/icr" in values] == [1.0, 2.0]
    assert next(values for values in logged if "samples" in values)["samples"] == "Image(000000000001.png)"
    assert wandb[-1] == ("finish", 1)

"""One report, three places: journal, MLflow and TensorBoard hold the same."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from mlflow_icr import Report
from mlflow_icr.monitoring.series import read_distributions
from mlflow_icr.monitoring.verdict import verdict
from mlflow_icr.tracking import MLflowSink, Sink, TensorBoardSink, Tracker, read_history
from mlflow_icr.tracking.logged import Logged
from mlflow_icr.tracking.operations import File
from mlflow_icr.tracking.tensorboard.answer import GROUP
from mlflow_icr.tracking.tensorboard.custom_scalars import LAYOUT, OVERLAY

# Values that lose bits in float32, or in a decimal of few digits.
ODD = [0.1 + 0.2, 1 / 3, 1e-300, 3e38, -0.0, 123456789.123456789, 2**53 + 1.0]


def report(step: int, seed: int = 0) -> Report:
    values = {"repr/icr": ODD[step % 7], "mem/ratio_l2": step / 1000, "perf/images_per_second": 1 / (step + 1)}
    picture = np.random.default_rng(step + seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Report(step, values, {"samples": picture}, {"gen/fd_pixels": "too few"}, "abc")


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar in the event files, without the reader's reservoir."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value") and not value.tag.startswith(GROUP):  # which is there under its own tag
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def mlflow_scalars(run_id: str) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    client = MlflowClient()
    keys = client.get_run(run_id).data.metrics
    return {key: sorted((m.step, m.value) for m in client.get_metric_history(run_id, key)) for key in keys}


def as_float32(scalars: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {key: [(step, float(np.float32(value))) for step, value in series] for key, series in scalars.items()}


def journal_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in read_history(folder):
        for key, value in row.items():
            if key != "images_seen":
                found.setdefault(key, []).append((int(row["images_seen"]), value))
    return found


def test_a_value_is_the_same_everywhere(tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink, board = MLflowSink(run_name="three places"), TensorBoardSink(tmp_path / "tensorboard")
    tracker = Tracker(tmp_path, [sink, board])
    tracker.open({"seed": 3, "sigmas": [0.29]}, {"study": "s"})
    for step in range(7):
        tracker.record(report(step))
    tracker.flush_local()
    board.flush()
    journal = journal_scalars(tmp_path)
    assert sorted(journal) == ["mem/ratio_l2", "perf/images_per_second", "repr/icr"]
    assert [v for _, v in journal["repr/icr"]] == ODD
    assert sink.flush()
    assert sink.run_id is not None
    assert mlflow_scalars(sink.run_id) == journal
    assert tensorboard_scalars(tmp_path / "tensorboard") == as_float32(journal)  # nobody closed anything yet

    summary = tracker.close("FINISHED")
    run = MlflowClient().get_run(sink.run_id)
    assert run.info.status == "FINISHED"
    assert {key: run.data.metrics[key] for key in summary} == summary
    assert (run.data.params["seed"], run.data.params["sigmas"], run.data.tags["study"]) == ("3", "[0.29]", "s")
    assert run.data.tags["absent.gen/fd_pixels"] == "too few"
    assert "gen/fd_pixels" not in run.data.metrics

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [e.step for e in events.Images("samples")] == list(range(7))
    shown = {tag for section in LAYOUT.values() for _, tags in section.values() for tag in tags}
    assert {"repr/icr_debiased", "mem/ratio_l2", *OVERLAY} <= shown
    (layout,) = events.Tensors("custom_scalars__config__")
    assert b"ICR, debiased, with its 95 % interval" in layout.tensor_proto.string_val[0]
    assert "_hparams_/session_start_info" in events.Tags()["tensors"] or events.summary_metadata["_hparams_/session_start_info"]
    assert [p.name for p in (tmp_path / "tensorboard").iterdir() if p.is_dir()] == []  # hparams are the run's own


def test_pictures_reach_mlflow_unchanged_with_their_step(tmp_path: Path) -> None:
    import mlflow
    from mlflow import MlflowClient
    from PIL import Image

    sink = MLflowSink()
    tracker = Tracker(tmp_path, [sink])
    tracker.open({}, {})
    tracker.record(report(640))
    tracker.close("FINISHED")
    files = [f.path for f in MlflowClient().list_artifacts(sink.run_id, "images") if f.path.endswith(".png")]
    assert len(files) == 1
    assert re.match(r"images/samples\Wstep\W640\W", files[0])
    local = mlflow.artifacts.download_artifacts(run_id=sink.run_id, artifact_path=files[0], dst_path=str(tmp_path / "down"))
    assert np.array_equal(np.asarray(Image.open(local)), report(640).figures["samples"])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "images/samples/000000000640.png")), report(640).figures["samples"])


def test_distributions_and_figures_are_kept_and_shown(tmp_path: Path) -> None:
    """Also in a sink that was not there when they were recorded."""
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

    numbers = {10: np.linspace(0, 1, 500), 20: np.linspace(2, 4, 300)}
    picture = report(1).figures["samples"]
    tracker = Tracker(tmp_path, [])
    tracker.open({}, {})
    tracker.record(Report(10, {"repr/icr": 0.1}, distributions={"mem/distance_pixels": numbers[10]}))
    sink = MLflowSink()
    tracker.abandon()
    tracker = Tracker(tmp_path, [sink, TensorBoardSink(tmp_path / "tensorboard")], resume="allow")
    tracker.open({}, {})
    tracker.record(Report(20, {"repr/icr": 0.1}, distributions={"mem/distance_pixels": numbers[20]}))
    for _ in range(2):
        tracker.figure("trade_off", picture, 20)
    tracker.close("FINISHED")
    for step, values in numbers.items():
        assert np.array_equal(read_distributions(tmp_path, step)["mem/distance_pixels"], values)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={HISTOGRAMS: 0})
    events.Reload()
    found = {e.step: e.histogram_value for e in events.Histograms("mem/distance_pixels")}
    assert {step: (h.num, h.min, h.max) for step, h in found.items()} == {10: (500, 0, 1), 20: (300, 2, 4)}
    assert [e.step for e in events.Images("figures/trade_off")] == [20, 20]
    assert [f.path for f in MlflowClient().list_artifacts(sink.run_id, "figures")] == ["figures/trade_off.png"]
    assert (tmp_path / "figures" / "trade_off.png").exists()


def test_the_run_of_the_project_is_adopted_with_its_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    client = MlflowClient()
    run = client.create_run("0")
    client.log_param(run.info.run_id, "learning_rate", "1e-4")  # as `mlflow run -P learning_rate=1e-4` does, as text
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    sink = MLflowSink(run_name="not used")
    tracker = Tracker(tmp_path, [sink])
    tracker.open({"learning_rate": 0.0001, "seed": 1}, {})
    tracker.record(report(1))
    tracker.close("KILLED")
    there = client.get_run(run.info.run_id)
    assert sink.run_id == run.info.run_id
    assert there.data.params == {"learning_rate": "1e-4", "seed": "1"}
    assert there.info.status == "KILLED"
    assert there.info.run_name == run.info.run_name
    assert len(client.search_runs(["0"])) == 1


def test_an_active_run_is_used_and_left_open(tmp_path: Path) -> None:
    import mlflow

    with mlflow.start_run() as run:
        sink = MLflowSink()
        tracker = Tracker(tmp_path, [sink])
        tracker.open({"a": 1}, {})
        tracker.record(report(2))
        tracker.close("FINISHED")
        active = mlflow.active_run()
        assert active is not None
        assert active.info.run_id == run.info.run_id == sink.run_id
        mlflow.log_metric("mine", 1)


def test_resuming_brings_every_sink_up_to_the_journal(tmp_path: Path) -> None:
    sink = MLflowSink()
    tracker = Tracker(tmp_path, [sink, TensorBoardSink(tmp_path / "tensorboard")])
    tracker.open({}, {})
    for step in (0, 1, 2):
        tracker.record(report(step))
    assert tracker.flush()
    tracker.journal.append(report(3))  # a kill after the journal's row, before the log has it
    tracker.abandon()  # as the end of a process does
    again = MLflowSink()
    resumed = Tracker(tmp_path, [again, TensorBoardSink(tmp_path / "tensorboard")], resume="allow")
    resumed.open({}, {})
    resumed.record(report(3, seed=9))  # measured again on the way: the journal has it already
    resumed.record(report(4))
    resumed.close("FINISHED")
    journal = journal_scalars(tmp_path)
    assert [step for step, _ in journal["repr/icr"]] == [0, 1, 2, 3, 4]
    stored = mlflow_scalars(sink.run_id)  # type: ignore[arg-type]
    assert {key: stored[key] for key in journal} == journal
    shown = tensorboard_scalars(tmp_path / "tensorboard")
    assert {key: shown[key] for key in journal} == as_float32(journal)


def described() -> dict[str, str]:
    from mlflow_icr.plugin.datasets import from_tensor

    return from_tensor(np.zeros((3, 1, 8, 8), np.uint8), name="noughts").to_dict()


def test_datasets_are_shown_once_and_stop_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def broken() -> dict[str, str]:
        raise RuntimeError("postgresql://user:hunter2@host")

    for _ in range(2):  # the second time is a resumption
        sink = MLflowSink(run_id=None if not (tmp_path / "run").exists() else (tmp_path / "run").read_text())
        tracker = Tracker(tmp_path, [sink, TensorBoardSink(tmp_path / "tensorboard")], resume="allow")
        tracker.open({}, {})
        tracker.dataset(described, "training")
        tracker.dataset(broken, "validation")
        tracker.close("FINISHED")
        assert sink.run_id is not None
        (tmp_path / "run").write_text(sink.run_id)
    assert "hunter2" not in caplog.text
    assert "MLflow does not take results (RuntimeError); training goes on" in caplog.text
    (entry,) = MlflowClient().get_run(sink.run_id).inputs.dataset_inputs
    assert json.loads(entry.dataset.profile)["shape"] == [3, 1, 8, 8]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    text = events.Tensors("data/training/text_summary")[0].tensor_proto.string_val[0].decode()
    assert entry.dataset.digest in text


def test_the_last_verdict_shown_is_of_all_measurements_also_of_those_that_come_late(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(tmp_path, [TensorBoardSink(tmp_path / "tensorboard")])
    tracker.open({}, {})
    ratios = [1.0, 1.02, 1.9, 3.6, 7.0, 14.0]
    late = 3
    said = []
    for place in (0, 1, 2, 4, 5, late):
        ratio = ratios[place]
        values = {
            "repr/view_error_ratio": ratio,
            "repr/view_error_ratio_low": 0.97 * ratio,
            "repr/view_error_ratio_high": 1.03 * ratio,
        }
        tracker.record(Report(2000 * 2**place, values, {}, {}, "abc"))
        said.append(tracker.verdict.text)
    assert said[-1] != said[-2]
    tracker.close("FINISHED")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tensors("Answer/verdict/text_summary")[-1].tensor_proto.string_val[0].decode() == said[-1]


def test_a_dead_server_costs_nothing_but_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow

    store = os.environ["MLFLOW_TRACKING_URI"]
    dead = "http://user:hunter2@127.0.0.1:9"  # the discard port: nothing listens
    for variable in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"):
        monkeypatch.setenv(variable, "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead)
    sink, board = MLflowSink(), TensorBoardSink(tmp_path / "tensorboard")
    tracker = Tracker(tmp_path, [sink, board])
    with caplog.at_level(logging.WARNING, "mlflow_icr"):
        tracker.open({"seed": 1}, {"study": "s"})
        tracker.dataset(described, "training")
        tracker.record(report(1))
        tracker.record(report(2))
        tracker.flush_local()
        assert not sink.flush()
    warnings = [r.getMessage() for r in caplog.records if "MLflow" in r.getMessage()]
    assert len(warnings) == 1
    assert "training goes on" in warnings[0]
    assert "hunter2" not in caplog.text
    board.flush()
    assert tensorboard_scalars(tmp_path / "tensorboard") == as_float32(journal_scalars(tmp_path))

    # The server comes back: what it missed arrives first, in order and once.
    sink.redirect(store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    tracker.record(report(3))
    tracker.flush_local()
    assert sink.flush()
    assert sink.run_id is not None
    assert mlflow_scalars(sink.run_id) == journal_scalars(tmp_path)
    client = mlflow.MlflowClient()
    run = client.get_run(sink.run_id)
    assert (run.data.params["seed"], run.data.tags["study"]) == ("1", "s")
    pictures = [f.path for f in client.list_artifacts(sink.run_id, "images") if f.path.endswith(".png")]
    assert len(pictures) == 3  # also those of the measurements that the server missed
    (entry,) = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.tags[0].value) == ("noughts", "training")
    tracker.close("FINISHED")
    assert client.get_run(sink.run_id).info.status == "FINISHED"


def test_a_server_that_fails_between_start_and_parameters_gets_them_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    sink = MLflowSink()
    tracker = Tracker(tmp_path, [sink])
    with monkeypatch.context() as failing:

        def refuse(*_: object, **__: object) -> None:
            raise ConnectionError("gone")

        failing.setattr(mlflow.MlflowClient, "log_batch", refuse)
        tracker.open({"seed": 1}, {})
        assert not sink.flush()
        tracker.record(report(1))
        tracker.flush_local()
    tracker.record(report(2))
    tracker.close("FINISHED")
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert (run.data.params["seed"], run.info.status) == ("1", "FINISHED")
    stored = mlflow_scalars(run.info.run_id)
    assert {key: stored[key] for key in journal_scalars(tmp_path)} == journal_scalars(tmp_path)


def test_the_journal_is_on_the_disk_before_the_trackers_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Late(Sink):
        name = "late"

        def metrics(self, values: Mapping[str, float], step: int, time: int) -> None:
            seen.append(step in [row["images_seen"] for row in read_history(tmp_path)])

        def tags(self, values: Mapping[str, str], step: int | None) -> None:
            raise RuntimeError  # one kind of result that a sink does not take costs none of the others

    monkeypatch.setattr("mlflow_icr.tracking.worker.PAUSES", (0.01,))
    tracker = Tracker(tmp_path, [Late()])
    for step in (0, 5):
        tracker.record(report(step))
    tracker.flush_local()
    assert seen == [True, True]


def test_a_sink_that_takes_its_time_holds_nobody_up(tmp_path: Path) -> None:
    """Each of its verdicts is that of the rows up to its own, however far the training has come."""
    free = threading.Event()
    told: list[tuple[object, ...]] = []

    class Slow(Sink):
        name = "slow"

        def metrics(self, values: Mapping[str, float], step: int, time: int) -> None:
            assert free.wait(60)
            if "loss" in values:
                told.append(("log", [step]))

        def tags(self, values: Mapping[str, str], step: int | None) -> None:
            if "verdict.text" in values:
                told.append((values["verdict.text"], step))

        def file(self, path: Path, file: File) -> None:
            told.append((file.name, file.step))

    tracker = Tracker(tmp_path, [Slow()])
    for step in range(3):
        tracker.record(report(step))
    tracker.log(Logged(7, 1000.0, {"loss": 0.5}))
    assert [row["images_seen"] for row in read_history(tmp_path)] == [0, 1, 2]
    last = tracker.verdict
    assert told == []
    free.set()
    tracker.figure("curves", np.zeros((4, 4, 3), np.uint8), 2)  # comes after all that
    tracker.flush_local()
    rows = read_history(tmp_path)
    assert told == [*((verdict(rows[: i + 1]).text, i) for i in range(3)), ("log", [7]), ("curves", 2)]
    assert last == verdict(rows)

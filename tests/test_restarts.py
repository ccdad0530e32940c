"""A training that was killed and goes on from a checkpoint before that: what TensorBoard and MLflow show then."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from mlflow_icr import Report
from mlflow_icr.bridge import import_runs
from mlflow_icr.bridge.event_folder import read_folder
from mlflow_icr.tracking import Logged, MLflowSink, TensorBoardSink, Tracker, read_logged
from mlflow_icr.tracking.operations import Metrics, to_line
from mlflow_icr.tracking.tensorboard.custom_scalars import ICR, OVERLAY, overlay
from tests.test_tracking import mlflow_scalars


def in_both_readers(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars as the reader in Python shows them; the same as by the rule of the fast one, which looks at steps alone."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    shown = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    shown.Reload()
    names = [tag for tag, data in shown.summary_metadata.items() if data.plugin_data.plugin_name == "scalars"]
    found = {tag: [(e.step, float(make_ndarray(e.tensor_proto))) for e in shown.Tensors(tag)] for tag in names}
    fast: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    before = [point for point in fast.get(value.tag, []) if point[0] < event.step]
                    fast[value.tag] = [*before, (event.step, value.simple_value)]
    assert found == fast
    return found


def killed(tracker: Tracker) -> None:
    """What the end of a process leaves: the files as they are, and no lock."""
    assert tracker.flush()
    tracker.abandon()


def begun(folder: Path, *, mlflow: bool = False) -> Tracker:
    # Event files are read in the order of their names: the second, the process, and its number there, as text. Real
    # processes do not follow each other within a second; here the tenth file would come before the ninth.
    while any(f".{int(time.time())}." in path.name for path in (folder / "tensorboard").glob("events.*")):
        time.sleep(0.05)
    sinks = [TensorBoardSink(folder / "tensorboard"), *([MLflowSink()] if mlflow else [])]
    tracker = Tracker(folder, sinks, resume="allow")
    tracker.open({}, {})
    return tracker


def test_what_a_killed_training_logged_is_taken_back_where_it_is_logged_again(tmp_path: Path) -> None:
    picture = np.full((4, 4, 3), 7, np.uint8)
    tracker = begun(tmp_path, mlflow=True)
    tracker.log(Logged(0, 1000.0, {"parameters": 9.0}))
    for step in range(10, 60, 10):  # killed after 50; its checkpoint was at 20
        tracker.log(Logged(step, 1000.0 + step, {"loss": 1 / step, "epoch": 1.0}))
    tracker.log(Logged(2, 1055.0, {"epoch_loss": 0.5}))  # by epochs: another unit
    tracker.log(Logged(40, 1056.0, {"heldout": 3.0}))
    tracker.record(Report(35, {"repr/icr": 0.25}, {"samples": picture}))  # by images seen: a third one
    killed(tracker)

    tracker = begun(tmp_path, mlflow=True)
    tracker.log(Logged(0, 2000.0, {"parameters": 9.0}))
    for step in range(30, 60, 10):
        tracker.log(Logged(step, 2000.0 + step, {"loss": 2 / step, "epoch": 1.0}))
    tracker.close("FINISHED")

    shown = in_both_readers(tmp_path / "tensorboard")
    assert shown["loss"] == [(s, pytest.approx(v)) for s, v in [(10, 0.1), (20, 0.05), (30, 2 / 30), (40, 0.05), (50, 0.04)]]
    assert [step for step, _ in shown["epoch"]] == [10, 20, 30, 40, 50]
    # Nothing else is hidden with it.
    assert shown["parameters"] == [(0, 9.0)]
    assert (shown["epoch_loss"], shown["heldout"], shown["repr/icr"]) == ([(2, 0.5)], [(40, 3.0)], [(35, 0.25)])
    folder = read_folder(tmp_path / "tensorboard")  # as an import sees it
    assert [step for tag, step, _ in folder.images if tag == "samples"] == [35]
    assert folder.scalars["loss"][0].tolist() == [10, 20, 30, 40, 50]
    # The file and MLflow keep both, apart by their times.
    both = sorted([(s, 1 / s) for s in range(10, 60, 10)] + [(s, 2 / s) for s in range(30, 60, 10)])
    assert sorted((row.step, row.values["loss"]) for row in read_logged(tmp_path) if "loss" in row.values) == both
    assert [row.step for row in read_logged(tmp_path) if row.resumes] == [0]
    run_id = next(sink.run_id for sink in tracker.sinks if isinstance(sink, MLflowSink))
    assert run_id is not None
    assert mlflow_scalars(run_id)["loss"] == both


def test_what_was_written_but_not_noted_is_not_written_twice(tmp_path: Path) -> None:
    """A kill between TensorBoard's file and what says how far it is; and that is lost."""
    for process in range(3):
        tracker = begun(tmp_path)
        for step in range(3 * process, 3 * process + 3):
            tracker.log(Logged(step, 1000.0 + step, {"loss": float(step)}, {"phase": "a"}))
        killed(tracker)
        (tmp_path / "tensorboard" / "tensorboard.json").unlink()
    begun(tmp_path).close("KILLED")
    assert in_both_readers(tmp_path / "tensorboard")["loss"] == [(step, float(step)) for step in range(9)]


def test_a_measurement_that_was_missed_comes_into_its_place(tmp_path: Path) -> None:
    """The fast reader would hide those after it."""
    tracker = begun(tmp_path)
    for step in range(0, 60, 10):
        if step != 20:
            tracker.record(Report(step, {ICR: 0.9 - step / 100, "mem/ratio_l2": step / 100}))
    killed(tracker)
    # What an earlier version's log may lack, since another sink of it had the measurement.
    missed = json.dumps({"images_seen": 20, ICR: 0.7, "mem/ratio_l2": 0.2}) + "\n"
    lines = (tmp_path / "history.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "history.jsonl").write_text("".join([*lines[:2], missed, *lines[2:]]))
    told = Metrics(20, 1000, {ICR: 0.7, "mem/ratio_l2": 0.2})
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(to_line(told))
    tracker = begun(tmp_path)
    tracker.record(Report(60, {ICR: 0.5, "mem/ratio_l2": 0.5}))
    killed(tracker)
    rows = tracker.journal.rows
    shown = in_both_readers(tmp_path / "tensorboard")
    assert [step for step, _ in shown[ICR]] == list(range(0, 70, 10))
    for tag in OVERLAY:
        expected = [(row["images_seen"], pytest.approx(overlay(rows[: i + 1])[tag])) for i, row in enumerate(rows)]
        assert shown[tag] == expected
    # MLflow has no use for it: an import leaves it out.
    (imported,) = import_runs(tmp_path / "tensorboard", "Default")
    assert set(mlflow_scalars(imported.run_id)) == {ICR, "mem/ratio_l2"}


def test_copies_stand_on_the_axis_of_icr() -> None:
    """Nothing copied: the lowest ICR so far; everything: that of the untrained network."""
    icr = [0.9, 0.5, 0.2, 0.4]
    for ratio in (0.0, 0.25, 1.0):
        rows = [{"images_seen": i, ICR: v, "mem/ratio_l2": ratio, "mem/ratio_l2_low": 0.0} for i, v in enumerate(icr)]
        for i in range(len(rows)):
            lowest = min(icr[: i + 1])
            found = overlay(rows[: i + 1])
            assert found["overlay/copies"] == pytest.approx(lowest + ratio * (0.9 - lowest))
            assert found["overlay/copies_low"] == pytest.approx(lowest)
            assert found["overlay/copies_high"] == found["overlay/copies"]  # unknown: the value's own
    assert overlay([{"images_seen": 0, ICR: 0.9}]) == {}
    assert overlay([{"images_seen": 0, "mem/ratio_l2": 0.1}]) == {}
    # A row that came late is compared with what was before it.
    assert overlay([*rows, {"images_seen": 1, "mem/ratio_l2": 0.0}])["overlay/copies"] == 0.5

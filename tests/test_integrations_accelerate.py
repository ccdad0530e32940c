"""What a script logs through Accelerate, read back from the folder, MLflow and TensorBoard."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from mlflow_icr import Report
from mlflow_icr.integrations.accelerate import ICRTracker
from mlflow_icr.integrations.pictures import as_pictures
from mlflow_icr.tracking import MLflowSink, TensorBoardSink, Tracker, read_history, read_logged
from mlflow_icr.tracking.keys import NOT_MLFLOW, clean_key
from mlflow_icr.tracking.logged import Logged
from tests import programs
from tests.servers import free_port
from tests.test_tracking import mlflow_scalars, tensorboard_scalars

ROOT = Path(__file__).parents[1]


def test_what_people_log_is_everywhere_and_measurements_are_beside_it(tmp_path: Path) -> None:
    """A script that knows nothing of us but log_with: the kinds of values that the stock tracker drops, too."""
    import mlflow
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, log_with=ICRTracker(tmp_path / "out", run_name="mine"))
    accelerator.init_trackers("project", config={"batch_size": 64, "optimizer": {"lr": 1e-4}, "name": "adam"})
    values = {
        "loss": torch.tensor(0.1, requires_grad=True),
        "half": torch.tensor(0.5, dtype=torch.bfloat16),
        "one": torch.tensor([7]),
        "np": np.float32(0.25),
        "count": np.int64(3),
        "grads": {"norm": 2.0, "clipped": True},
        "lr": [1e-4, 2e-4],
        "weird key=#1": 1.5,
        "phase": "warm-up",
    }
    accelerator.log(values, step=5)
    tracker = accelerator.get_tracker("icr", unwrap=True)
    tracker.record(Report(5, {"repr/icr": 0.5}))  # a measurement at the step of a log
    accelerator.log({"loss": math.nan, "phase": "main"}, step=6)
    accelerator.log({"loss": 3})  # the step after the last one that was named
    pictures = [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")]
    accelerator.trackers[0].log_images({"samples": pictures, "no": "picture"}, step=6)
    accelerator.trackers[0].log_table("best", ["image", "score"], [["a", 0.5], ["b", 1]], step=6)
    accelerator.end_training()

    expected = {"loss": 0.1, "half": 0.5, "one": 7, "np": 0.25, "count": 3, "grads/norm": 2, "grads/clipped": 1}
    expected |= {"lr/0": 1e-4, "lr/1": 2e-4, "weird key=#1": 1.5}
    first, second, third = read_logged(tmp_path / "out")
    assert first.values == pytest.approx(expected)
    assert (first.texts, second.texts, third.step) == ({"phase": "warm-up"}, {"phase": "main"}, 7)
    assert math.isnan(second.values["loss"])
    assert [row["images_seen"] for row in read_history(tmp_path / "out")] == [5]

    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert (run.info.status, run.info.run_name, run.data.tags["logged.phase"]) == ("FINISHED", "mine", "main")
    assert run.data.params == {"batch_size": "64", "optimizer/lr": "0.0001", "name": "adam"}
    stored, shown = mlflow_scalars(run.info.run_id), tensorboard_scalars(tmp_path / "out")
    for key, value in expected.items():
        assert stored[clean_key(key, NOT_MLFLOW)][0] == (5, pytest.approx(value))
        assert shown[key][0] == (5, pytest.approx(value, rel=1e-6))  # float32 there
    for scalars in (stored, shown):
        assert [step for step, _ in scalars["loss"]] == [5, 6, 7]
        assert scalars["repr/icr"] == [(5, 0.5)]
    paths = [f.path for f in mlflow.MlflowClient().list_artifacts(run.info.run_id, "images") if f.path.endswith(".png")]
    assert len(paths) == 1
    assert mlflow.MlflowClient().list_artifacts(run.info.run_id, "tables/logged/best")
    events = EventAccumulator(str(tmp_path / "out"))
    events.Reload()
    assert [image.step for image in events.Images("samples")] == [6]
    with Image.open(tmp_path / "out" / "logged" / "images" / "samples" / "000000000006.png") as kept:
        assert kept.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("raise KeyError('no')", "FAILED"),
        ("raise KeyboardInterrupt", "KILLED"),
        ("os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(30)", "KILLED"),
        ("", "FINISHED"),
    ],
)
def test_a_program_that_ends_without_end_training_has_a_status(tmp_path: Path, ending: str, status: str) -> None:
    import mlflow

    code = f"""
import os, signal, sys, time
from accelerate import Accelerator
from mlflow_icr.integrations.accelerate import ICRTracker
accelerator = Accelerator(cpu=True, log_with=ICRTracker(sys.argv[1]))
accelerator.init_trackers("project", config={{"a": 1}})
for step in range(3):
    accelerator.log({{"loss": step}}, step=step)
{ending}
"""
    programs.run(["-c", code, str(tmp_path / "out")])
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.info.status == status
    assert mlflow_scalars(run.info.run_id)["loss"] == [(0, 0), (1, 1), (2, 2)]


def test_two_ranks_have_one_run(tmp_path: Path) -> None:
    import mlflow

    code = """
import sys
from accelerate import Accelerator
from mlflow_icr.integrations.accelerate import ICRTracker
accelerator = Accelerator(cpu=True, log_with=ICRTracker(sys.argv[1], images_per_step=32))
accelerator.init_trackers("project")
accelerator.log({"rank": accelerator.process_index, "ranks": accelerator.num_processes}, step=2)
accelerator.end_training()
"""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        programs.start(["-c", code, str(tmp_path / "out")], env={**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    for rank in ranks:
        done = rank.wait()
        assert done.returncode == 0, done.stderr
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert mlflow_scalars(run.info.run_id) == {"rank": [(64, 0)], "ranks": [(64, 2)]}


def test_a_folder_that_holds_a_run_is_resumed_or_refused(tmp_path: Path) -> None:
    import mlflow

    for resume in (False, True):
        tracker = ICRTracker(tmp_path, resume=resume)
        tracker.log({"loss": 1.0 + resume}, step=1 + resume)
        tracker.finish()
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert mlflow_scalars(run.info.run_id)["loss"] == [(1, 1.0), (2, 2.0)]
    assert tensorboard_scalars(tmp_path)["loss"] == [(1, 1.0), (2, 2.0)]  # none twice
    with pytest.raises(ValueError, match="which holds a run; expected a new folder, or resume"):
        ICRTracker(tmp_path)


def test_values_that_a_dead_server_missed_arrive_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And a loop that logs at every step does not wait for it at every step."""
    store = os.environ["MLFLOW_TRACKING_URI"]
    for variable in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"):
        monkeypatch.setenv(variable, "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:9")
    sink = MLflowSink()
    asked: list[int] = []
    probe = sink.reachable
    monkeypatch.setattr(sink, "reachable", lambda: (asked.append(1), probe())[1])
    tracker = Tracker(tmp_path, [sink, TensorBoardSink(tmp_path / "tensorboard")])
    with caplog.at_level(logging.WARNING, "mlflow_icr"):
        tracker.open({}, {})
        for step in range(500):
            tracker.log(Logged(step, 1e9 + step, {"loss": step / 7}))
    tracker.flush_local()
    assert 1 <= len(asked) <= 6  # each lane asks, and then waits
    assert "hunter2" not in caplog.text
    sink.redirect(store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    tracker.close("FINISHED")
    assert sink.run_id is not None
    assert mlflow_scalars(sink.run_id)["loss"] == [(step, step / 7) for step in range(500)]
    assert [step for step, _ in tensorboard_scalars(tmp_path / "tensorboard")["loss"]] == list(range(500))


def test_a_torn_line_of_values_is_cut_off(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, [])
    tracker.log(Logged(1, 0.0, {"a": 1.0}))
    tracker.abandon()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "metrics", "step": 2, "ti')
    assert [row.step for row in read_logged(tmp_path)] == [1]
    again = Tracker(tmp_path, [], resume="allow")
    again.log(Logged(3, 0.0, {"a": 3.0}))
    assert [row.step for row in read_logged(tmp_path)] == [1, 3]


def test_pictures_of_every_form_are_the_same() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    first = as_pictures(pixels)[0]
    forms = [
        torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
        torch.from_numpy(pixels.transpose(0, 3, 1, 2) / 255),
        pixels / 255,
        list(pixels),
        [Image.fromarray(p) for p in pixels],
    ]
    for form in forms:
        (picture,) = as_pictures(form)
        assert np.array_equal(picture, first)
    assert np.array_equal(first[:48, 50:98], pixels[1])
    assert len(as_pictures([pixels[0], pixels[0, :20]])) == 2  # sizes differ
    for wrong in ("text", np.zeros(5), []):
        with pytest.raises(ValueError, match="expected"):
            as_pictures(wrong)


def test_keys_are_those_that_every_store_takes() -> None:
    assert [clean_key(key) for key in ("a//b/../c", "/x/", "é=1", 3, "", "k" * 300)] == [
        "a/b/__/c",
        "x",
        "__1",
        "3",
        "_",
        "k" * 250,
    ]

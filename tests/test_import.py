"""Event files as MLflow runs, and back: what TensorBoard reads is what the store has."""

from __future__ import annotations

import io
import math
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from mlflow_icr.bridge.tensorboard_export import export_runs
from mlflow_icr.bridge.tensorboard_import import Imported, import_runs
from mlflow_icr.cli import main
from mlflow_icr.tracking.tensorboard.event_file import unseen
from tests.test_export import decoded, line, picture, read, shown, stored

WALL = 1_700_000_000.123


def runs(experiment: str) -> dict[str, Run]:
    client = MlflowClient()
    found = client.get_experiment_by_name(experiment)
    return {run.info.run_name: run for run in client.search_runs([found.experiment_id])}


def added(imported: Iterable[Imported]) -> tuple[int, int]:
    counts = [(run.new_points, run.new_images) for run in imported]
    return sum(points for points, _ in counts), sum(images for _, images in counts)


@pytest.fixture
def logdir(tmp_path: Path) -> Path:
    """Two folders as training programs leave them, one nested in the other, with awkward names and values."""
    root = tmp_path / "somebody's logs"
    with SummaryWriter(str(root)) as writer:
        for step in range(1500):
            writer.add_scalar("loss", 1 / (step + 1), 5 * step, walltime=WALL + step / 8)
        writer.add_scalar("Loss@train/(mse) [%]", 0.5, 1, walltime=WALL)
        writer.add_scalar("Loss_train/_mse_ ___", 0.25, 1, walltime=WALL)  # what the former could be called
        writer.add_scalar("a//b/../c", 2.0, 1, walltime=WALL)
        writer.add_scalar("x" * 300, 3.0, 1, walltime=WALL)
        for step, value in enumerate([math.inf, -math.inf, 1e-45, -0.0]):
            writer.add_scalar("odd", value, step, walltime=WALL)
        writer.add_scalar("lost", math.nan, 7, walltime=WALL)
        writer.add_histogram("weights", np.arange(5.0), 1, walltime=WALL)
        writer.add_text("note", "first", 1, walltime=WALL)
        writer.add_text("note", "second *version*", 2, walltime=WALL + 1)
        writer.add_image("samples/a:b", picture(1), 40, walltime=WALL, dataformats="HWC")
        writer.add_image("samples/a:b", picture(2), 80, walltime=WALL + 1, dataformats="HWC")
        writer.add_hparams({"lr": 1e-4, "layers": 3, "optimizer": "adam", "ema": True}, {}, run_name=".")
    with SummaryWriter(str(root / "eval" / "test")) as writer:
        for step in range(4):
            writer.add_scalar("accuracy", step / 4, step, walltime=WALL + step, new_style=True)  # as a tensor
    return root


def test_folders_become_runs_with_their_values_steps_and_times(logdir: Path) -> None:
    said: list[str] = []
    assert added(import_runs(logdir, "imported", echo=said.append)) == (1513, 2)
    assert said == ["somebody's logs: MLflow has no place for histograms (1); left out"]
    found = runs("imported")
    assert sorted(found) == ["eval/test", "somebody's logs"]
    run = found["somebody's logs"]
    assert run.info.status == "FINISHED"
    assert run.info.start_time == round(WALL * 1000)
    # torch's writer makes a number of a truth value.
    assert run.data.params == {"lr": "0.0001", "layers": "3", "optimizer": "adam", "ema": "1"}
    there = stored(run.info.run_id)
    assert there["loss"] == shown(logdir)["loss"]
    assert there["loss"][3] == (15, round((WALL + 3 / 8) * 1000), 0.25)
    assert stored(found["eval/test"].info.run_id)["accuracy"] == [
        (step, round((WALL + step) * 1000), step / 4) for step in range(4)
    ]
    assert math.isnan(there["lost"][0][2])
    assert [value for _, _, value in there["odd"]] == [math.inf, -math.inf, np.float32(1e-45), 0.0]
    # Each name is MLflow's and its own, and the original is kept.
    names = {
        tag: key.removeprefix("tensorboard.tag.") for key, tag in run.data.tags.items() if key.startswith("tensorboard.tag.")
    }
    assert there["Loss_train/_mse_ ___"][0][2] == 0.25
    assert there[names["Loss@train/(mse) [%]"]][0][2] == 0.5
    assert there[names["a//b/../c"]][0][2] == 2.0
    assert there[names["x" * 300]][0][2] == 3.0
    assert run.data.tags["tensorboard.text.note"] == "second *version*"
    client = MlflowClient()
    [text] = [file.path for file in client.list_artifacts(run.info.run_id, "text")]
    written = Path(client.download_artifacts(run.info.run_id, text)).read_text()
    assert written.index("first") < written.index("second *version*")
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert sorted(re.findall(r"\+step\+(\d+)\+timestamp\+(\d+)", " ".join(images))) == [
        ("40", str(round(WALL * 1000))),
        ("80", str(round(WALL * 1000) + 1000)),
    ]


def test_a_repeat_adds_what_is_new_and_nothing_twice(logdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-tensorboard", str(logdir), "--experiment", "imported"]) == 0
    before = {name: (stored(run.info.run_id), run.data.tags, run.data.params) for name, run in runs("imported").items()}
    assert added(import_runs(logdir, "imported")) == (0, 0)
    after = {name: (stored(run.info.run_id), run.data.tags, run.data.params) for name, run in runs("imported").items()}
    assert str(after) == str(before)  # as text, where NaN is itself

    with SummaryWriter(str(logdir), filename_suffix=".later") as writer:
        writer.add_scalar("loss", 9.0, 3, walltime=WALL - 5)  # earlier than all others
        writer.add_scalar("loss", 1.0, 0, walltime=WALL)  # there already
        writer.add_scalar("Loss:train/(mse) [%]", 4.0, 1, walltime=WALL)
        writer.add_image("samples/a:b", picture(3), 120, walltime=WALL + 2, dataformats="HWC")
        writer.add_text("note", "third", 3, walltime=WALL + 2)
    assert added(import_runs(logdir, "imported")) == (2, 1)
    assert added(import_runs(logdir, "imported")) == (0, 0)
    run = runs("imported")["somebody's logs"]
    assert run.data.tags["tensorboard.text.note"] == "third"
    there = stored(run.info.run_id)
    assert (3, round((WALL - 5) * 1000), 9.0) in there["loss"]
    assert len(there["loss"]) == 1501
    assert {len(there[key]) for key in there if key.startswith("Loss")} == {1}
    assert len([key for key in there if key.startswith("Loss")]) == 3


def test_a_logdir_that_was_moved_has_the_runs_that_it_had(logdir: Path, tmp_path: Path) -> None:
    first = {run.folder.name: run.run_id for run in import_runs(logdir, "imported")}
    moved = logdir.rename(tmp_path / "elsewhere")
    said: list[str] = []
    again = import_runs(moved, "imported", echo=said.append)
    assert added(again) == (0, 0)
    assert {run.folder.name: run.run_id for run in again} == {"elsewhere": first["somebody's logs"], "test": first["test"]}
    # What is at the old place now is another training's, and a copy is one too.
    with SummaryWriter(str(logdir), filename_suffix=".new") as writer:
        writer.add_scalar("loss", 1.0, 0, walltime=WALL)
    (other,) = import_runs(logdir, "imported")
    assert (other.run_id in first.values(), other.new_points) == (False, 1)
    shutil.copytree(moved / "eval", tmp_path / "copy")
    (copied,) = import_runs(tmp_path / "copy", "imported")
    assert (copied.run_id in first.values(), copied.new_points) == (False, 4)
    assert added(import_runs(moved, "imported")) == (0, 0)


def test_an_import_leaves_the_output_of_other_threads_alone(logdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`set_terminated` prints the run's address, which may have a password; nothing is redirected for that."""
    seen: list[bool] = []
    stdout = sys.stdout
    for name in ("set_terminated", "update_run", "log_batch"):
        real = getattr(MlflowClient, name)

        def noted(*arguments: Any, real: Any = real, **keywords: Any) -> Any:
            seen.append(sys.stdout is stdout)
            return real(*arguments, **keywords)

        monkeypatch.setattr(MlflowClient, name, noted)
    import_runs(logdir, "imported")
    assert seen
    assert all(seen)


def test_there_and_back_gives_the_same_events(logdir: Path, tmp_path: Path) -> None:
    import_runs(logdir, "imported")
    folders = {run.run_id: run.folder for run in export_runs(tmp_path / "back", experiment="imported")}
    by_name = {name: folders[run.info.run_id] for name, run in runs("imported").items()}
    original, back = shown(logdir), shown(by_name["somebody's logs"])
    assert math.isnan(original.pop("lost")[0][2])
    assert math.isnan(back.pop("lost")[0][2])
    assert back == original  # tags as well: MLflow's names are undone
    assert shown(by_name["eval/test"]) == {"accuracy": [(s, round((WALL + s) * 1000), s / 4) for s in range(4)]}
    images = read(by_name["somebody's logs"]).Images("samples/a:b")
    assert [(e.step, round(e.wall_time * 1000)) for e in images] == [
        (40, round(WALL * 1000)),
        (80, round(WALL * 1000) + 1000),
    ]
    assert [np.array_equal(decoded(e), picture(seed)) for e, seed in zip(images, (1, 2), strict=True)] == [True, True]

    # What was exported can be imported again, as runs of its own.
    import_runs(tmp_path / "back", "again")
    run = runs("again")[by_name["somebody's logs"].name]
    assert run.data.params == runs("imported")["somebody's logs"].data.params
    assert shown_without_nan(stored(run.info.run_id)) == shown_without_nan(
        stored(runs("imported")["somebody's logs"].info.run_id)
    )


def shown_without_nan(series: dict[str, Any]) -> dict[str, Any]:
    return {key: points for key, points in series.items() if key != "lost"}


def test_what_a_restarted_writer_takes_back_is_left_out(tmp_path: Path) -> None:
    for index, (purge, first) in enumerate([(None, 0), (3, 3)]):
        with SummaryWriter(str(tmp_path / "run"), purge_step=purge, filename_suffix=f".{index}") as writer:
            for step in range(first, 6):
                writer.add_scalar("loss", step + 10 * index, step, walltime=WALL + step + 100 * index)
    import_runs(tmp_path, "imported")
    assert stored(runs("imported")["run"].info.run_id) == shown(tmp_path / "run")
    assert [value for _, _, value in shown(tmp_path / "run")["loss"]] == [0, 1, 2, 13, 14, 15]


def test_a_torn_file_and_a_foreign_one_cost_only_what_is_torn(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step, moment, value in line(50):
            writer.add_scalar("loss", value, step, walltime=moment / 1000)
    [path] = (tmp_path / "run").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    (tmp_path / "run" / "zz.tfevents.not").write_bytes(b"a text that is no record at all")
    said: list[str] = []
    assert added(import_runs(tmp_path, "imported", echo=said.append)) == (49, 0)
    assert [path.name in text or "zz.tfevents.not" in text for text in said] == [True, True]
    path.write_bytes(whole)  # its writer went on
    assert added(import_runs(tmp_path, "imported")) == (1, 0)
    assert stored(runs("imported")["run"].info.run_id) == shown(tmp_path / "run")


def test_an_import_that_was_broken_off_is_completed(logdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, batches = MlflowClient.log_batch, 0

    def breaks(self: MlflowClient, *arguments: Any, **keywords: Any) -> Any:
        nonlocal batches
        batches += bool(keywords.get("metrics"))
        if batches == 3:
            raise KeyboardInterrupt
        return real(self, *arguments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_batch", breaks)
        assert main(["import-tensorboard", str(logdir), "--experiment", "imported"]) == 130
    assert runs("imported")["somebody's logs"].info.status == "RUNNING"
    points, images = added(import_runs(logdir, "imported"))
    assert 0 < points < 1513
    assert images == 2
    assert runs("imported")["somebody's logs"].info.status == "FINISHED"
    assert stored(runs("imported")["somebody's logs"].info.run_id)["loss"] == shown(logdir)["loss"]


def test_bad_input_is_one_line(logdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (tmp_path / "nowhere", logdir.parent / "empty"):
        (logdir.parent / "empty").mkdir(exist_ok=True)
        assert main(["import-tensorboard", str(place), "--experiment", "x"]) == 2
        said = f"logdir is '{place}', which has no event files; expected a folder with *tfevents* in it or below"
        assert capsys.readouterr().err == f"mlflow-icr: error: {said}\n"
    client = MlflowClient()
    client.delete_experiment(client.create_experiment("gone"))
    assert main(["import-tensorboard", str(logdir), "--experiment", "gone"]) == 2
    assert "experiment is 'gone', which was deleted" in capsys.readouterr().err


def test_several_images_of_one_event_get_names_of_their_own(tmp_path: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.image import metadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util import tensor_util

    def encoded(array: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(array).save(file, format="png")
        return file.getvalue()

    event = Event(step=4, wall_time=WALL)
    strings = [b"13", b"9", encoded(picture(1)), encoded(picture(2))]
    event.summary.value.add(
        tag="two",
        tensor=tensor_util.make_tensor_proto(np.array(strings, dtype=object)),
        metadata=metadata.create_summary_metadata("", "", converted_to_tensor=False),
    )
    writer = EventFileWriter(str(tmp_path / "run"))
    writer.add_event(event)
    writer.close()
    assert added(import_runs(tmp_path, "imported")) == (0, 2)
    [folder] = [run.folder for run in export_runs(tmp_path / "back", experiment="imported")]
    events = read(folder)
    assert [np.array_equal(decoded(events.Images(f"two/{i}")[0]), picture(i + 1)) for i in (0, 1)] == [True, True]


def test_unseen_is_a_difference_of_multisets(rng: np.random.Generator) -> None:
    from collections import Counter

    points, seen = (rng.integers(0, 3, (size, 3)) for size in (60, 40))
    expected = Counter(map(tuple, points.tolist())) - Counter(map(tuple, seen.tolist()))
    assert Counter(map(tuple, points[unseen(points, seen)].tolist())) == expected
    assert len(unseen(points[:0], seen[:0])) == 0

"""MLflow runs as event files: TensorBoard's own readers see what the store has, once, whatever happened in between."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from mlflow_icr.bridge.tensorboard_export import Exporter, export_runs
from mlflow_icr.tracking.mlflow import store

START = 1_700_000_000_000
Point = tuple[int, int, float]


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def shown(folder: Path) -> dict[str, list[Point]]:
    """(step, wall time in ms, value) of every scalar, as TensorBoard reads them, sorted."""
    events = read(folder)
    tags = events.Tags()["scalars"]
    return {tag: sorted((e.step, round(e.wall_time * 1000), e.value) for e in events.Scalars(tag)) for tag in tags}


def stored(run_id: str) -> dict[str, list[Point]]:
    """The same of the store, by MLflow's own client, with values as float32."""
    client = MlflowClient()
    found = {}
    with np.errstate(over="ignore"):
        for key in client.get_run(run_id).data.metrics:
            history = client.get_metric_history(run_id, key)
            found[key] = sorted((m.step, m.timestamp, float(np.float32(m.value))) for m in history)
    return found


def log(run_id: str, key: str, points: list[Point]) -> None:
    for start in range(0, len(points), 1000):
        metrics = [Metric(key, value, moment, step) for step, moment, value in points[start : start + 1000]]
        MlflowClient().log_batch(run_id, metrics=metrics)


def line(count: int, start: int = 0) -> list[Point]:
    return [(10 * i, START + 7 * i, 1 / (i + 1)) for i in range(start, start + count)]


def new_run(name: str = "a run", **tags: str) -> str:
    run_id: str = MlflowClient().create_run("0", start_time=START, run_name=name, tags=tags).info.run_id
    return run_id


def export(logdir: Path, run_id: str) -> Path:
    """Export one run; returns its folder."""
    found = {run.run_id: run.folder for run in export_runs(logdir, run_ids=[run_id])}
    return found[run_id]


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (9, 13, 3), dtype=np.uint8)


def decoded(event: Any) -> np.ndarray:
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))


def test_histories_are_whole_and_a_repeat_adds_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PAGE", 100)
    run_id = new_run()
    log(run_id, "loss/train", line(1234))  # many pages
    log(run_id, "odd", [(0, START, math.inf), (1, START, -math.inf), (2, START, 0.1), (2, START + 1, 0.1), (-3, START, 1e-300)])
    log(run_id, "lost", [(5, START, math.nan)])
    folder = export(tmp_path, run_id)
    first = shown(folder)
    assert math.isnan(first.pop("lost")[0][2])
    expected = stored(run_id)
    expected.pop("lost")
    assert first == expected
    assert len(first["loss/train"]) == 1234

    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert export(tmp_path, run_id) == folder
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == sizes

    log(run_id, "loss/train", line(150, start=1234))
    log(run_id, "new", line(3))
    export(tmp_path, run_id)
    again = shown(folder)
    assert (again["loss/train"], again["new"]) == (stored(run_id)["loss/train"], stored(run_id)["new"])


def test_points_that_come_late_with_an_earlier_time_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PAGE", 50)
    run_id = new_run()
    log(run_id, "loss", line(120))
    folder = export(tmp_path, run_id)
    log(run_id, "loss", [(5, START + 1, 0.5), (6, START + 300, math.nan), (7, START - 9, 2.0)])
    log(run_id, "loss", line(60, start=120))
    export(tmp_path, run_id)
    export(tmp_path, run_id)
    nan = [point for point in shown(folder)["loss"] if math.isnan(point[2])]
    assert nan[0][:2] == (6, START + 300)
    assert len(nan) == 1
    assert [p for p in shown(folder)["loss"] if p[2] == p[2]] == [p for p in stored(run_id)["loss"] if p[2] == p[2]]


def test_parameters_and_tags_make_one_row_for_each_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    client = MlflowClient()
    runs = [new_run("same name", team="blue"), new_run("same name"), new_run("../../etc/passwd :-)")]
    for index, run_id in enumerate(runs):
        # Two runs with equal parameters, one with a parameter of its own.
        params = [Param("lr", "1e-4"), Param("seed", "007"), Param("ema", "True"), *[Param("only", "x")] * (index == 2)]
        client.log_batch(run_id, params=params, metrics=[Metric("loss", index, START, 1)])
    client.set_terminated(runs[0], "FAILED")
    assert [run.new_points for run in export_runs(tmp_path / "tb", experiment="Default")] == [1, 1, 1]
    folders = sorted(path.name for path in (tmp_path / "tb").iterdir())
    assert len(folders) == 3
    assert sum(name.startswith("same_name-") for name in folders) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tb"]

    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tmp_path / "tb"))
    multiplexer.Reload()
    flags: Any = None
    context = base_plugin.TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(tmp_path)), flags=flags)
    backend, request_context = backend_context.Context(context), RequestContext()
    metadata = backend.hparams_metadata(request_context, "")
    experiment = backend.experiment_from_metadata(request_context, "", True, metadata, None)
    assert sorted(info.name for info in experiment.hparam_infos) == ["ema", "lr", "only", "seed", "tag/team"]
    assert [info.name.tag for info in experiment.metric_infos] == ["loss"]
    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=range(4), slice_size=10, col_params=[{"metric": {"tag": "loss"}}], start_index=0
    )
    rows = list_session_groups.Handler(request_context, backend, "", request).run().session_groups
    assert sorted(row.name for row in rows) == folders
    by_id = {row.name[-8:]: row for row in rows}
    failed = by_id[runs[0][:8]]
    assert failed.sessions[0].status == api_pb2.STATUS_FAILURE
    assert (failed.hparams["lr"].number_value, failed.hparams["seed"].string_value) == (1e-4, "007")
    assert failed.hparams["ema"].bool_value is True
    assert failed.hparams["tag/team"].string_value == "blue"

    # A description that changes is replaced, also when the run is renamed: one folder stays one.
    client.update_run(runs[0], name="renamed")
    client.log_batch(runs[0], params=[Param("late", "3")], tags=[RunTag("team", "red")])
    export_runs(tmp_path / "tb", experiment="Default")
    assert sorted(path.name for path in (tmp_path / "tb").iterdir()) == folders
    start = read(next((tmp_path / "tb").glob(f"*-{runs[0][:8]}"))).summary_metadata["_hparams_/session_start_info"]
    assert b"late" in start.plugin_data.content
    assert b"red" in start.plugin_data.content


def test_pictures_come_with_key_and_step(tmp_path: Path) -> None:
    from matplotlib.figure import Figure
    from PIL import Image

    client = MlflowClient()
    run_id = new_run()
    log(run_id, "loss", line(1))
    for step in (20, 3):
        client.log_image(run_id, picture(step), key="samples/ema one", step=step, timestamp=START + step, synchronous=True)
    client.log_image(run_id, picture(0), key="loss", step=1, synchronous=True)  # a name that a metric has
    client.log_image(run_id, Image.fromarray(picture(1)), "figures/plain.bmp")
    client.log_figure(run_id, Figure(), "curve.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    client.log_artifact(run_id, str(tmp_path / "broken.png"))
    said: list[str] = []
    exporter = Exporter(tmp_path / "tb", echo=said.append)
    assert exporter.run(client.get_run(run_id)).new_images == 5
    assert len(said) == 1
    assert "broken.png" in said[0]
    folder = exporter.run(client.get_run(run_id)).folder
    client.log_image(run_id, Image.fromarray(picture(2)).resize((50, 50)), "figures/plain.bmp")  # logged again
    assert exporter.run(client.get_run(run_id)).new_images == 1

    events = read(folder)
    assert sorted(events.Tags()["images"]) == ["curve.png", "figures/plain.bmp", "images/loss", "samples/ema one"]
    samples = events.Images("samples/ema one")
    assert [(e.step, round(e.wall_time * 1000), e.width, e.height) for e in samples] == [
        (3, START + 3, 13, 9),
        (20, START + 20, 13, 9),
    ]
    assert all(np.array_equal(decoded(e), picture(e.step)) for e in samples)
    plain = events.Images("figures/plain.bmp")
    assert [(e.step, e.width) for e in plain] == [(0, 13), (1, 50)]
    assert np.array_equal(decoded(plain[0]), picture(1))


def test_a_picture_that_was_replaced_by_one_of_its_size_is_its_next_version(tmp_path: Path) -> None:
    from PIL import Image

    client, run_id = MlflowClient(), new_run()
    for seed in (1, 1, 2, 2, 1):
        client.log_image(run_id, Image.fromarray(picture(seed)), "plain.bmp")  # not compressed: one size for all
        folder = export(tmp_path, run_id)
    events = read(folder).Images("plain.bmp")
    assert [event.step for event in events] == [0, 1, 2]
    assert [np.array_equal(decoded(e), picture(seed)) for e, seed in zip(events, (1, 2, 1), strict=True)] == [True] * 3


def test_following_lists_folders_without_pictures_once_in_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, run_id = MlflowClient(), new_run()
    (tmp_path / "weights").write_bytes(b"w")
    for step in range(10):
        for part in ("unet", "scheduler"):
            client.log_artifact(run_id, str(tmp_path / "weights"), f"checkpoints/{step}/{part}")
    client.log_image(run_id, picture(1), "figures/a.png")
    listed: list[str | None] = []
    real, looks = MlflowClient.list_artifacts, 0

    def counted(self: MlflowClient, run_id: str, path: str | None = None) -> Any:
        listed.append(path)
        return real(self, run_id, path)

    def look(found: Any) -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            assert len(listed) == 33  # all there is, once
        elif looks == 3:
            assert listed[33:] == [None, "figures"] * 2
            client.log_image(run_id, picture(2), "figures/b.png")
            client.log_image(run_id, picture(3), "new/c.png")
            client.log_image(run_id, picture(4), "checkpoints/3/unet/d.png")
            client.set_terminated(run_id)

    monkeypatch.setattr(MlflowClient, "list_artifacts", counted)
    (found,) = export_runs(tmp_path / "tb", experiment="Default", follow=True, interval=0.01, on_run=look)
    assert found.new_images == 4  # at the run's end everything is looked at
    assert sorted(read(found.folder).Tags()["images"]) == [
        "checkpoints/3/unet/d.png", "figures/a.png", "figures/b.png", "new/c.png",
    ]  # fmt: skip


def test_nested_runs_are_in_the_folder_of_their_parent_whichever_is_asked_for(tmp_path: Path) -> None:
    parent = new_run("parent")
    child = new_run("child", **{"mlflow.parentRunId": parent})
    grandchild = new_run("grandchild", **{"mlflow.parentRunId": child})
    orphan = new_run("orphan", **{"mlflow.parentRunId": "0" * 32})
    loop = new_run("loop")
    MlflowClient().set_tag(loop, "mlflow.parentRunId", loop)
    for run_id in (parent, child, grandchild, orphan, loop):
        log(run_id, "loss", line(2))
    alone = export(tmp_path, grandchild)
    whole = {run.run_id: run.folder.relative_to(tmp_path).as_posix() for run in export_runs(tmp_path, run_ids=[parent])}
    p, c, g = f"parent-{parent[:8]}", f"child-{child[:8]}", f"grandchild-{grandchild[:8]}"
    assert whole == {parent: p, child: f"{p}/{c}", grandchild: f"{p}/{c}/{g}"}
    assert alone == tmp_path / p / c / g
    rest = {run.run_id: run for run in export_runs(tmp_path, experiment="Default")}
    assert rest[grandchild].new_points == 0
    assert (rest[orphan].folder.parent, rest[loop].folder.parent) == (tmp_path, tmp_path)
    assert shown(alone) == stored(grandchild)

"""Checkpoints that a training has left, measured in order into a folder and into the run that it was."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from mlflow_icr import ICRMonitor, Protocol, SchedulerDenoiser
from mlflow_icr.cli import main
from mlflow_icr.integrations.backfill import measure_checkpoints
from mlflow_icr.integrations.saved import find_checkpoints
from mlflow_icr.monitoring.series import read_arrays, read_history
from tests import programs

ROOT = Path(__file__).parents[1]
STEPS = (2, 4, 10)  # whose names are not in this order
BATCH = 8
VIEWS = Protocol(num_views=4)


def moved(network: nn.Module, seed: int) -> Any:
    """The network, some way on in training."""
    found = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in found.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return found


@pytest.fixture
def data(tmp_path: Path, digits: Tensor) -> Path:
    (tmp_path / "data").mkdir()
    for i, image in enumerate(digits[:24]):
        Image.fromarray(image[0].numpy()).save(tmp_path / "data" / f"{i:02d}.png")
    return tmp_path / "data"


@pytest.fixture
def training(tmp_path: Path, small_unet: nn.Module) -> Path:
    """What diffusers' train_unconditional.py leaves: averages beside the weights, and a pipeline around them."""
    folder = tmp_path / "model"
    DDPMPipeline(moved(small_unet, 99), DDPMScheduler(prediction_type="v_prediction")).save_pretrained(folder)
    for step in STEPS:
        checkpoint = folder / f"checkpoint-{step}"
        moved(small_unet, 1000 + step).save_pretrained(checkpoint / "unet")
        moved(small_unet, step).save_pretrained(checkpoint / "unet_ema")
        for path in checkpoint.rglob("*"):
            os.utime(path, (1.7e9 + step, 1.7e9 + step))
    (folder / "checkpoint-12").mkdir()  # nothing was written yet
    (folder / "logs-3").write_text("no folder")
    return folder


def expected(small_unet: nn.Module, digits: Tensor) -> Iterator[dict[str, float]]:
    denoiser: Any = SchedulerDenoiser(copy.deepcopy(small_unet), DDPMScheduler(prediction_type="v_prediction"))
    monitor = ICRMonitor(denoiser, digits[:24], VIEWS)
    for step in STEPS:
        denoiser.network.load_state_dict(moved(small_unet, step).state_dict())
        yield monitor.measure(step * BATCH).flat()


def points(run_id: str) -> dict[str, list[tuple[int, int, float]]]:
    client = mlflow.MlflowClient()
    return {
        key: [(p.step, p.timestamp, p.value) for p in client.get_metric_history(run_id, key)]
        for key in client.get_run(run_id).data.metrics
    }


def test_a_finished_run_is_filled_at_its_steps_and_times_once(
    training: Path, data: Path, small_unet: nn.Module, digits: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mlflow.start_run() as run:
        mlflow.log_metric("loss", 0.5, step=16)
        mlflow.log_param("protocol.sigmas", "somebody's own")
    run_id = run.info.run_id
    before = mlflow.MlflowClient().get_run(run_id)
    command = ["measure", "--checkpoints", str(training), "--data", str(data), "--run-id", run_id, "--num-views", "4"]
    command += ["--images-per-step", str(BATCH)]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.startswith("undecided")
    assert "checkpoint-12 is left out: it holds neither unet_ema, unet" in said.err
    rows = read_history(training / "icr")
    for row, values in zip(rows, expected(small_unet, digits), strict=True):
        assert row.keys() == values.keys()
        for key in row.keys() - {"perf/measure_seconds"}:
            assert row[key] == pytest.approx(values[key], rel=1e-6, abs=1e-12), key

    there = points(run_id)
    times = [round((1.7e9 + step) * 1000) for step in STEPS]
    for key in ("repr/icr", "repr/icr_rise", "repr/view_error_ratio", "perf/measure_seconds"):
        shown = zip((row["images_seen"] for row in rows), times, (row[key] for row in rows), strict=True)
        assert there[key] == list(shown), key
    assert there["loss"] == [(16, there["loss"][0][1], 0.5)]
    found = mlflow.MlflowClient().get_run(run_id)
    assert (found.info.status, found.info.end_time) == ("FINISHED", before.info.end_time)
    assert found.data.tags["icr.backfilled"] == "true"
    assert found.data.tags["verdict"] == "undecided"
    assert found.data.params["protocol.sigmas"] == "somebody's own"
    events = EventAccumulator(str(training / "icr")).Reload()
    assert [(e.step, e.wall_time) for e in events.Scalars("repr/icr")] == [
        (step * BATCH, 1.7e9 + step) for step in STEPS
    ]  # fmt: skip
    assert read_arrays(training / "icr", 16)["repr/influence"].shape == (24,)
    assert main(["verdict", str(training / "icr")]) == 0
    assert capsys.readouterr().out.startswith("undecided")

    def everything() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted((training / "icr").rglob("*")) if path.is_file()}

    files = everything()
    assert main(command) == 0  # again
    assert everything() == files
    assert main([*command, "--output-dir", str(tmp_path / "elsewhere")]) == 0  # whose outbox knows nothing of the first
    assert points(run_id) == there
    capsys.readouterr()

    shutil.copytree(training / "checkpoint-10", training / "checkpoint-20")
    shutil.copytree(training / "checkpoint-2", training / "checkpoint-3")  # too late for growth and rise
    assert main(command) == 1
    assert "checkpoint-3 is left out: step 80 was measured before it" in capsys.readouterr().err
    assert [step for step, *_ in points(run_id)["repr/icr"]] == [16, 32, 80, 160]


def test_the_folder_alone_then_the_run_gives_the_run_the_same(training: Path, data: Path) -> None:
    """Measured without MLflow first: what the journal has goes to the run at the checkpoints' times."""
    options: dict[str, Any] = {"images_per_step": BATCH, "protocol": VIEWS}
    first = measure_checkpoints(training, data, **options)
    assert (first.measured, first.known) == ([16, 32, 80], [])
    assert mlflow.search_runs(search_all_experiments=True).empty
    with mlflow.start_run() as run:
        pass
    second = measure_checkpoints(training, data, run_id=run.info.run_id, **options)
    assert (second.measured, second.known, second.complete) == ([], [16, 32, 80], True)
    found = points(run.info.run_id)["repr/icr"]
    rows = read_history(training / "icr")
    assert found == [
        (row["images_seen"], round((1.7e9 + step) * 1000), row["repr/icr"]) for row, step in zip(rows, STEPS, strict=True)
    ]
    with mlflow.start_run() as other:
        pass
    with pytest.raises(ValueError, match=f"go to {run.info.run_id}; expected that one"):
        measure_checkpoints(training, data, run_id=other.info.run_id, **options)


def without_seconds(folder: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "perf/measure_seconds"} for row in read_history(folder)]


def test_interrupted_between_checkpoints_it_goes_on_as_if_nothing_had_happened(
    training: Path, data: Path, tmp_path: Path
) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("checkpoint-4:"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_checkpoints(training, data, tmp_path / "cut", protocol=VIEWS, echo=interrupt)
    again = measure_checkpoints(training, data, tmp_path / "cut", protocol=VIEWS)
    assert (again.measured, again.known) == ([10], [2, 4])
    measure_checkpoints(training, data, tmp_path / "whole", protocol=VIEWS)
    assert without_seconds(tmp_path / "cut") == without_seconds(tmp_path / "whole")


@pytest.mark.slow
def test_killed_between_checkpoints_it_goes_on_as_if_nothing_had_happened(training: Path, data: Path, tmp_path: Path) -> None:
    with mlflow.start_run() as run:
        pass
    out = [tmp_path / "killed", tmp_path / "whole"]
    command = [sys.executable, "-m", "mlflow_icr.cli", "measure", "--checkpoints", str(training), "--data", str(data)]
    command += ["--output-dir", str(out[0]), "--run-id", run.info.run_id, "--num-views", "4"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("checkpoint-2:"):
                process.kill()
        process.wait(300)
    assert [row["images_seen"] for row in read_history(out[0])] in ([2], [2, 4])
    options: dict[str, Any] = {"protocol": VIEWS}
    again = measure_checkpoints(training, data, out[0], run_id=run.info.run_id, **options)
    assert again.complete
    assert sorted(again.measured + again.known) == [2, 4, 10]
    measure_checkpoints(training, data, out[1], **options)
    rows, whole = without_seconds(out[0]), without_seconds(out[1])
    assert len(rows) == 3
    for row, same in zip(rows, whole, strict=True):
        assert row == pytest.approx(same, rel=1e-6, abs=1e-12)
    there = points(run.info.run_id)
    assert [step for step, *_ in there["repr/icr"]] == [2, 4, 10]
    assert [value for *_, value in there["repr/icr_rise"]] == [row["repr/icr_rise"] for row in read_history(out[0])]


def test_checkpoints_of_the_trainers_here_are_pipelines_themselves(
    small_unet: nn.Module, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = tmp_path / "one" / "checkpoints"
    for step in (1000, 2000, 3000):
        DDPMPipeline(moved(small_unet, step), DDPMScheduler()).save_pretrained(checkpoints / f"{step:012d}")
    (broken,) = (checkpoints / "000000002000" / "unet").glob("*.safetensors")
    broken.write_bytes(broken.read_bytes()[:100])
    command = ["measure", "--checkpoints", str(tmp_path / "one"), "--data", str(data), "--num-views", "4"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "000000002000 is left out: diffusion_pytorch_model.safetensors ends within its header" in said
    assert "2 checkpoints measured, 0 were before" in said
    assert [row["images_seen"] for row in read_history(tmp_path / "one" / "icr")] == [1000, 3000]


def test_what_does_not_fit_is_refused_before_anything_is_measured(
    training: Path, data: Path, tmp_path: Path, small_unet: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["measure", "--checkpoints", str(training), "--data", str(data), "--num-views", "4"]

    def refused(message: str, *more: str) -> None:
        assert main([*command, *more]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert message in line

    refused("run_id is 'f00', which the tracking store does not have", "--run-id", "f00")
    refused("images_per_step is 0; expected at least 1", "--images-per-step", "0")
    with mlflow.start_run() as run:
        mlflow.log_param("protocol_digest", "123")
    refused("was measured by the protocol 123, and this is", "--run-id", run.info.run_id)
    assert not (training / "icr").exists()
    assert main(command) == 0
    capsys.readouterr()
    refused("protocol_digest is", "--seed", "1")
    refused("dtype is 'bfloat16', but", "--dtype", "bfloat16")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "history.jsonl").write_text(json.dumps({"images_seen": 1}) + "\n")
    refused("which holds a run; expected a new folder", "--output-dir", str(tmp_path / "other"))
    command[2] = str(tmp_path / "data")
    refused("holds no folder or file with a number and weights")
    for part in ("model_index.json", "unet", "scheduler"):
        path = training / part
        path.unlink() if path.is_file() else shutil.rmtree(path)
    command[2] = str(training)
    refused("pipeline is not given, and neither", "--output-dir", str(tmp_path / "new"))
    DDPMPipeline(small_unet, DDPMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / "base")
    assert main([*command, "--output-dir", str(tmp_path / "new"), "--pipeline", str(tmp_path / "base")]) == 0
    old, new = read_history(training / "icr"), read_history(tmp_path / "new")
    assert [row["repr/icr"] for row in new] == [row["repr/icr"] for row in old]
    shutil.copytree(training / "checkpoint-2", training / "step2")
    with pytest.raises(ValueError, match="checkpoint-2 and step2 are of one step"):
        find_checkpoints(training)


def test_one_model_is_measured_into_a_run_of_the_same_protocol(
    training: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = mlflow.MlflowClient()
    run_id = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)  # as `mlflow run` does
    command = ["measure", "--pipeline", str(training), "--data", str(data), "--num_views=4", "--images-seen", "80"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    found = client.get_run(run_id)
    assert found.data.params["protocol_digest"] == printed.pop("protocol_digest")
    assert found.data.metrics == {key: value for key, value in printed.items() if key != "images_seen"}
    assert {step for values in points(run_id).values() for step, *_ in values} == {80}
    there = points(run_id)
    assert main(command) == 0
    assert points(run_id) == there
    capsys.readouterr()
    assert main([*command, "--sigma", "0.5"]) == 2
    assert "values of two cannot be compared; expected another run, or none" in capsys.readouterr().err
    assert main([*command, "--run-id", "0" * 32]) == 2
    assert points(run_id) == there


def test_mlflow_run_measures_into_its_own_run(training: Path, data: Path, tmp_path: Path) -> None:
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    given = {"data": data, "checkpoints": training, "images_per_step": BATCH, "num_views": 4, "output_dir": tmp_path / "out"}
    command = ["-m", "mlflow", "run", str(ROOT), "-e", "measure", "--env-manager", "local"]
    command += [part for key, value in given.items() for part in ("-P", f"{key}={value}")]
    done = programs.run(command, cwd=ROOT, env=os.environ | path, timeout=400)
    assert done.returncode == 0, done.stderr
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    rows = read_history(tmp_path / "out")
    assert [row["images_seen"] for row in rows] == [step * BATCH for step in STEPS]
    assert run.info.status == "FINISHED"
    assert [(step, value) for step, _, value in points(run.info.run_id)["repr/icr"]] == [
        (row["images_seen"], row["repr/icr"]) for row in rows
    ]

"""The watch on a folder of checkpoints: each once, the newest first, across interruptions and kills, into both trackers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlflow
import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from filelock import FileLock
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from mlflow_icr import Protocol
from mlflow_icr.cli import main
from mlflow_icr.integrations.backfill import measure_checkpoints
from mlflow_icr.integrations.checkpoint_measurement import suited_protocol
from mlflow_icr.integrations.checkpoint_watch import LOCK, CheckpointWatch, Pace
from mlflow_icr.integrations.saved import SavedTraining
from mlflow_icr.monitoring import Verdict
from mlflow_icr.monitoring.series import read_history
from tests.test_backfill import moved
from tests.tiny_models import stable_diffusion

VIEWS = Protocol(num_views=4)
AT_ONCE = Pace(settle=0.0, poll=0.01)
pytestmark = pytest.mark.usefixtures("few_errors")


@pytest.fixture
def data(tmp_path: Path, digits: Tensor) -> Path:
    (tmp_path / "data").mkdir()
    for i, image in enumerate(digits[:24]):
        Image.fromarray(image[0].numpy()).save(tmp_path / "data" / f"{i:02d}.png")
    return tmp_path / "data"


@pytest.fixture
def base(tmp_path: Path, small_unet: nn.Module) -> Path:
    DDPMPipeline(small_unet, DDPMScheduler()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def save(folder: Path, unet: nn.Module, step: int) -> None:
    """What a script that knows nothing of us saves."""
    moved(unet, step).save_pretrained(folder / f"checkpoint-{step}" / "unet")


def watch(folder: Path, data: Path, **options: Any) -> CheckpointWatch:
    return CheckpointWatch(folder, data, **{"protocol": VIEWS, "pace": AT_ONCE, **options})


def without_seconds(folder: Path) -> dict[int, dict[str, float]]:
    return {
        int(row["images_seen"]): {key: value for key, value in row.items() if key != "perf/measure_seconds"}
        for row in read_history(folder)
    }


def test_the_earliest_then_the_newest_then_what_was_left_behind(
    base: Path, data: Path, small_unet: nn.Module, tmp_path: Path
) -> None:
    folder, lines, states = tmp_path / "model", list[str](), list[str]()
    for step in (10, 20, 30):
        save(folder, small_unet, step)

    def echo(line: str) -> None:
        lines.append(line)
        if line.startswith("checkpoint-10:"):
            save(folder, small_unet, 40)  # while that one was measured

    def heard(found: Verdict) -> None:
        states.append(found.state)

    made = watch(folder, data, base=base, images_per_step=8, echo=echo, on_verdict=heard)
    found = made.run()
    assert made.measured == [80, 320, 240, 160]
    assert made.left_out == {}
    assert found is not None
    assert found == made.verdict
    assert states[-1] == found.state
    assert all(one != other for one, other in pairwise(states))  # once for each change
    assert lines[0].startswith(f"{base}: 0 images seen")
    assert "(2 more are waiting)" in lines[1]
    rows = without_seconds(folder / "icr")
    assert list(rows) == [0, 80, 320, 240, 160]
    # In order, by the command for trainings that are over, the same is measured.
    measure_checkpoints(folder, data, tmp_path / "ordered", pipeline=base, images_per_step=8, protocol=VIEWS)
    ordered = without_seconds(tmp_path / "ordered")
    for step in (80, 160, 240, 320):
        rises = {key for key in ordered[step] if key.startswith("repr/icr_rise")}
        assert len(rises) == 3
        # Before an earlier one was measured, its lowest value was not known.
        assert rises & rows[step].keys() == (rises if step in (80, 160) else set())
        shared = {key: value for key, value in ordered[step].items() if key in rows[step]}
        assert shared.keys() | rises == ordered[step].keys()
        assert rows[step] == pytest.approx(shared, rel=1e-5, abs=1e-7), step
    run = mlflow.search_runs(search_all_experiments=True, output_format="list")[0]
    assert run.data.tags["verdict"] == found.state
    assert run.info.status == "FINISHED"
    points = mlflow.MlflowClient().get_metric_history(run.info.run_id, "repr/icr")
    assert sorted((p.step, p.value) for p in points) == sorted((step, row["repr/icr"]) for step, row in rows.items())
    events = EventAccumulator(str(folder / "icr")).Reload()
    assert [e.step for e in events.Scalars("repr/icr")] == [0, 80, 160, 240, 320]
    assert found.state in events.Tensors("Answer/verdict/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert (folder / "icr" / "report" / "index.html").is_file()

    # A later watch measures what is new alone, in the same run, and has nothing to say of a verdict that is the same.
    save(folder, small_unet, 50)
    states.clear()
    again = watch(folder, data, base=base, images_per_step=8, on_verdict=heard)
    again.run()
    assert again.measured == [400]
    assert again.verdict is not None
    assert states == ([] if again.verdict.state == found.state else [again.verdict.state])
    assert len(mlflow.search_runs(search_all_experiments=True, output_format="list")) == 1
    with FileLock(folder / "icr" / LOCK), pytest.raises(ValueError, match="which another watch is writing"):
        watch(folder, data, base=base, images_per_step=8).run()
    with pytest.raises(ValueError, match="images_per_step is 4, but"):
        watch(folder, data, base=base, images_per_step=4).run()


def test_what_cannot_be_measured_is_named_and_costs_nothing_else(
    base: Path, data: Path, small_unet: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    save(folder, small_unet, 1)
    save(folder, small_unet, 2)
    (weights,) = (folder / "checkpoint-2" / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-7])  # the trainer died there
    (folder / "checkpoint-3").mkdir()
    command = ["watch", "--checkpoints", str(folder), "--data", str(data), "--base", str(base), "--num-views", "4"]
    command += ["--settle", "0.1", "--poll", "0.05"]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "checkpoint-2 is left out: diffusion_pytorch_model.safetensors has" in said.err
    assert "checkpoint-3 is left out: it holds neither" in said.err
    assert "1 checkpoints measured" in said.err
    assert said.out.startswith("undecided")
    assert list(without_seconds(folder / "icr")) == [0, 1]
    for more, message in (
        (["--poll", "0"], "poll is 0.0; expected at least 0.01 seconds"),
        (["--images-per-step", "0"], "images_per_step is 0; expected at least 1"),
        (["--base", str(tmp_path / "nowhere")], "checkpoint is '"),
        (["--checkpoints", str(tmp_path / "nowhere")], "which is no folder"),
        (["--output-dir", str(tmp_path / "empty"), "--checkpoints", str(data)], "which holds no checkpoint"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err


def test_few_images_are_read_along_the_directions_that_they_span(base: Path, digits: Tensor) -> None:
    denoiser = SavedTraining(base).denoiser
    plain = Protocol()
    assert suited_protocol(plain, denoiser, digits[:200], 64) is plain
    few = suited_protocol(Protocol(sigmas=(0.5,)), denoiser, digits[:2], 64)
    assert (few.projection, few.num_views, few.sigmas) == (1, 64, (0.5,))
    given = Protocol(num_views=8)
    assert suited_protocol(given, denoiser, digits[:2], 64) is given


# Two trainers: the folders of diffusers' scripts, and LoRA files with the names, keys and metadata of kohya's sd-scripts.
# They import nothing of this library, write slowly, as over a network, and go on where they were killed.
TRAINER = """
import sys, time
from pathlib import Path
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors.torch import save

layout, folder, base, stops_at = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
unet = (UNet2DModel if layout == "diffusers" else UNet2DConditionModel).from_pretrained(base, subfolder="unet")
torch.manual_seed(0)
pairs = {
    name: (torch.randn(2, layer.in_features), torch.zeros(layer.out_features, 2))
    for name, layer in unet.named_modules()
    if isinstance(layer, torch.nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
}

def write(path, content, step):
    with path.open("wb") as file:
        for part in range(0, len(content), len(content) // 4 + 1):
            file.write(content[part : part + len(content) // 4 + 1])
            file.flush()
            time.sleep(3600 if step == stops_at else 0.05)

def save_folder(step):
    path = folder / f"checkpoint-{step}" / "unet"
    unet.save_pretrained(path)
    weights = path / "diffusion_pytorch_model.safetensors"
    write(weights, weights.read_bytes(), step)

def save_lora(step):
    tensors = {}
    for name, (down, up) in pairs.items():
        plain = "lora_unet_" + name.replace(".", "_")
        tensors[plain + ".lora_down.weight"], tensors[plain + ".lora_up.weight"] = down, up
        tensors[plain + ".alpha"] = torch.tensor(2.0)
    metadata = {"ss_steps": str(step), "ss_total_batch_size": "4", "ss_network_module": "networks.lora"}
    name = "fox.safetensors" if step == 60 else f"fox-step{step:08d}.safetensors"
    write(folder / name, save(tensors, metadata), step)

for step in range(10, 70, 10):
    with torch.no_grad():
        for p in [up for _, up in pairs.values()] if layout == "kohya" else unet.parameters():
            p += 0.02 * torch.randn(p.shape)
    done = folder.parent / f"done-{step}"
    if not done.exists():
        (save_folder if layout == "diffusers" else save_lora)(step)
        done.write_text("")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "killed_at", "images_per_step"),
    [("diffusers", "checkpoint-40/unet/diffusion_pytorch_model.safetensors", 1), ("kohya", "fox-step00000040.safetensors", 4)],
)
def test_both_sides_are_killed_and_each_checkpoint_is_measured_once(
    layout: str, killed_at: str, images_per_step: int, small_unet: nn.Module, data: Path, tmp_path: Path
) -> None:
    folder, script, base = tmp_path / "model", tmp_path / "train.py", tmp_path / "base"
    folder.mkdir()
    script.write_text(TRAINER)
    made = DDPMPipeline(small_unet, DDPMScheduler()) if layout == "diffusers" else stable_diffusion(tmp_path / "tokenizer")
    made.save_pretrained(base)
    train = [sys.executable, str(script), layout, str(folder), str(base)]
    command = [sys.executable, "-m", "mlflow_icr.cli", "watch", "--checkpoints", str(folder), "--data", str(data)]
    command += ["--base", str(base), "--num-views", "4", "--follow", "--settle", "0.5", "--poll", "0.1"]
    command += [] if layout == "diffusers" else ["--resolution", "16"]
    history = folder / "icr" / "history.jsonl"

    def rows() -> int:
        return history.read_text().count("\n") if history.exists() else 0

    trainer, watcher = subprocess.Popen([*train, "40"]), subprocess.Popen(command)
    wait_until(lambda: rows() >= 2)
    watcher.kill()
    watcher.wait()
    wait_until((folder / killed_at).exists)
    trainer.kill()  # in the middle of saving
    trainer.wait()
    watcher = subprocess.Popen(command)
    wait_until(lambda: rows() >= 3)
    watcher.kill()
    watcher.wait()
    subprocess.run([*train, "0"], check=True, timeout=600)
    done = subprocess.run([*command, "--end-after", "5"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    steps = [int(json.loads(line)["images_seen"]) for line in history.read_text().splitlines()]
    assert sorted(steps) == [images_per_step * step for step in (0, 10, 20, 30, 40, 50, 60)]
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    points = mlflow.MlflowClient().get_metric_history(run.info.run_id, "repr/view_error_ratio")
    assert sorted(p.step for p in points) == sorted(steps)
    state = done.stdout.split()[0]
    assert run.data.tags["verdict"] == state
    events = EventAccumulator(str(folder / "icr")).Reload()
    assert [e.step for e in events.Scalars("repr/view_error_ratio")] == sorted(steps)
    assert state in events.Tensors("Answer/verdict/text_summary")[-1].tensor_proto.string_val[0].decode()


@pytest.mark.slow
def test_a_stopped_watch_ends_its_run_and_says_how_to_go_on(
    base: Path, data: Path, tmp_path: Path, small_unet: nn.Module
) -> None:
    folder = tmp_path / "model"
    save(folder, small_unet, 1)
    command = [sys.executable, "-m", "mlflow_icr.cli", "watch", "--checkpoints", str(folder), "--data", str(data)]
    command += ["--base", str(base), "--num-views", "4", "--follow", "--settle", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: (folder / "icr" / "history.jsonl").exists() and len(read_history(folder / "icr")) == 2)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "the same command resumes from here" in process.stderr.read()
    assert process.returncode == 0
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.status == "FINISHED"


def wait_until(condition: Callable[[], bool], seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)

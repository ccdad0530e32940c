"""An unmodified diffusers script is measured: this one makes the public calls that those of diffusers make."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mlflow_icr import ICRMonitor, Protocol, SchedulerDenoiser, verdict
from mlflow_icr.integrations.diffusers import main
from mlflow_icr.integrations.hooks import images_for
from mlflow_icr.tracking import read_history, read_logged
from tests.test_tracking import journal_scalars, mlflow_scalars

# Batch 8, two batches accumulated, 6 optimizer steps of 16 images.
SCRIPT = """
import argparse
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from sklearn.datasets import load_digits

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir")
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--channels", type=int, default=1)
parser.add_argument("--prediction_type", default="epsilon")
parser.add_argument("--no_ema", action="store_true")
parser.add_argument("--fail_at", type=int)
parser.add_argument("--save_state")
parser.add_argument("--load_state")
args = parser.parse_args()
torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True, log_with=None)
unet = UNet2DModel(sample_size=8, in_channels=args.channels, out_channels=args.channels, layers_per_block=1,
    norm_num_groups=4, add_attention=False, block_out_channels=(16, 32), dropout=0.1,
    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
ema = None if args.no_ema else EMAModel(unet.parameters(), decay=0.5, model_cls=UNet2DModel, model_config=unet.config)
scheduler = DDPMScheduler(prediction_type=args.prediction_type)
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
images = torch.from_numpy(load_digits().images[:48]).float()[:, None] / 8 - 1
loader = torch.utils.data.DataLoader(images, batch_size=8, shuffle=True)
unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
if accelerator.is_main_process:
    accelerator.init_trackers("script", config={"lr": 1e-3})
if args.load_state:
    accelerator.load_state(args.load_state)
step = 0
while step < args.steps:
    for clean in loader:
        clean = clean.repeat(1, args.channels, 1, 1)
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),))
        noisy = scheduler.add_noise(clean, noise, t)
        with accelerator.accumulate(unet):
            target = noise if args.prediction_type == "epsilon" else scheduler.get_velocity(clean, noise, t)
            loss = (unet(noisy, t).sample - target).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            if ema is not None:
                ema.step(unet.parameters())
            step += 1
            accelerator.log({"loss": loss.detach(), "lr": 1e-3}, step=step)
            if step == args.fail_at:
                raise RuntimeError("the script failed")
            if step == args.steps:
                break
if args.save_state:
    accelerator.save_state(args.save_state)
accelerator.end_training()
net = accelerator.unwrap_model(unet)
DDPMPipeline(net, scheduler).save_pretrained(args.output_dir)
if ema is not None:
    ema.copy_to(net.parameters())
    net.save_pretrained(args.output_dir + "/ema")
"""


pytestmark = pytest.mark.usefixtures("few_errors")


@pytest.fixture
def data(tmp_path: Path, digits: torch.Tensor) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(digits[:48]):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:03d}.png")
    return folder


def run(
    tmp_path: Path, data: Path | None, name: str, *flags: str, ours: tuple[str, ...] = (), ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    """The script, under the hooks where there is data, in a process of its own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "29632"]
    if data is not None:
        command += [
            "-m",
            "mlflow_icr.integrations.diffusers",
            "--data",
            str(data),
            "--output-dir",
            str(tmp_path / f"{name}-icr"),
        ]
        command += [*ours]
    command += [str(script), "--output_dir", str(tmp_path / name), *flags]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path)


def run_here(tmp_path: Path, name: str, *flags: str, ours: tuple[str, ...] = ()) -> object:
    """The same in this process, which has imported everything; returns the exit status, or the text that stands for one."""
    from accelerate.state import AcceleratorState

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    own = ["--output_dir", str(tmp_path / name), *flags]
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "argv", [str(script), *own])
        try:
            if not ours:
                runpy.run_path(str(script), run_name="__main__")
                return 0
            return main([*ours, "--output-dir", str(tmp_path / f"{name}-icr"), str(script), *own])
        except SystemExit as error:
            return error.code
        finally:
            signal.signal(signal.SIGTERM, handler)
            AcceleratorState._reset_state(reset_partial_state=True)


def test_a_script_trains_the_same_and_is_measured_as_a_monitor_measures(tmp_path: Path, data: Path) -> None:
    """Weights bit for bit those without hooks; values those of a monitor on the average that the script saved."""
    import mlflow
    from diffusers import DDPMScheduler, UNet2DModel

    assert run_here(tmp_path, "bare") == 0
    ours = ("--data", str(data), "--every", "32", "--num-images", "40", "--save")
    assert run_here(tmp_path, "watched", ours=ours) == 0
    for name in ("unet", "ema"):
        weights = [load_file(tmp_path / run / name / "diffusion_pytorch_model.safetensors") for run in ("bare", "watched")]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    folder = tmp_path / "watched-icr"
    rows = read_history(folder)
    assert [row["images_seen"] for row in rows] == [0, 32, 64, 96]

    network = UNet2DModel.from_pretrained(tmp_path / "watched" / "ema")
    images = images_for(network, data, 0)
    protocol = Protocol(num_images=40)
    expected = ICRMonitor(SchedulerDenoiser(network, DDPMScheduler()), images, protocol).measure(96)
    for key in ("repr/icr", "repr/view_error_ratio", "repr/trace_residual"):
        assert rows[-1][key] == pytest.approx(expected.values[key], rel=1e-4), key  # both float32, in the same batches
    kept = UNet2DModel.from_pretrained(folder / "checkpoints" / "000000000096" / "unet")
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), network.parameters(), strict=True))

    (found,) = mlflow.MlflowClient().search_runs(["0"])
    assert (found.info.status, found.data.params["lr"], found.data.params["script"]) == ("FINISHED", "0.001", "script.py")
    stored, journal = mlflow_scalars(found.info.run_id), journal_scalars(folder)
    assert {key: stored[key] for key in journal} == journal
    assert [step for step, _ in stored["loss"]] == [16 * i for i in range(1, 7)]  # by images seen, as the measurements are
    assert found.data.tags["verdict"] == verdict(rows).state
    assert json.loads(found.data.tags["logged.protocol"])["weights"] == "average"


@pytest.mark.slow
def test_v_prediction_in_colour_without_an_average_and_a_script_that_fails(tmp_path: Path, data: Path) -> None:
    import mlflow

    flags = ("--channels", "3", "--prediction_type", "v_prediction", "--no_ema", "--fail_at", "3")
    done = run(tmp_path, data, "failed", *flags, ours=("--at", "0,40"))
    assert done.returncode == 1
    assert "RuntimeError: the script failed" in done.stderr
    assert [row["images_seen"] for row in read_history(tmp_path / "failed-icr")] == [0]  # 48 images, but no batch after them
    assert len(read_logged(tmp_path / "failed-icr")) == 4  # the protocol, and three steps
    (found,) = mlflow.MlflowClient().search_runs(["0"])
    assert found.info.status == "FAILED"
    assert json.loads(found.data.tags["logged.protocol"])["prediction_type"] == "v_prediction"


@pytest.mark.slow
def test_a_script_that_resumes_goes_on_in_the_run(tmp_path: Path, data: Path) -> None:
    import mlflow

    first = run(tmp_path, data, "a", "--steps", "2", "--save_state", str(tmp_path / "state"), ours=("--every", "32"))
    assert first.returncode == 0, first.stderr
    ours = ("--every", "32", "--resume")
    again = run(tmp_path, data, "a", "--steps", "3", "--load_state", str(tmp_path / "state"), ours=ours)
    assert again.returncode == 0, again.stderr
    # 32 was measured already; the end, after 80 images, is no point of the schedule, but an end
    assert [row["images_seen"] for row in read_history(tmp_path / "a-icr")] == [0, 32, 64, 80]
    assert len(mlflow.MlflowClient().search_runs(["0"])) == 1


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ranks_measure_together_and_stop_together(tmp_path: Path, data: Path, ranks: int) -> None:
    """The folder's past is that of a model that has turned: the verdict, of the whole history, ends the training."""
    import mlflow

    mlflow.search_runs()  # a fresh store is made by one process
    folder = tmp_path / "stopped-icr"
    folder.mkdir()
    ratio = "repr/far_error_ratio"
    past = [
        {"images_seen": seen, ratio: 2.0**k, f"{ratio}_low": 0.99 * 2**k, f"{ratio}_high": 1.01 * 2**k}
        for k, seen in enumerate((1, 2, 4, 8, 15))
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in past))
    ours = ("--stop-on", "turning", "--every", "64", "--resume")
    if ranks == 1:
        assert run_here(tmp_path, "stopped", "--steps", "1000", ours=("--data", str(data), *ours)) == 0
    else:
        done = run(tmp_path, data, "stopped", "--steps", "1000", ours=ours, ranks=ranks)
        assert done.returncode == 0, done.stderr
    # 0, and where it stopped: after the first step, of two batches of eight on each rank
    assert [row["images_seen"] for row in read_history(folder)][5:] == [0, 16 * ranks]
    (found,) = mlflow.MlflowClient().search_runs(["0"])
    assert (found.info.status, found.data.tags["verdict"]) == ("FINISHED", "turning")
    assert (folder / "checkpoints" / f"{16 * ranks:012d}" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert not (tmp_path / "stopped").exists()  # the script did not come to saving


RANK = """
import atexit, sys, threading, time
from mlflow_icr.integrations.ending import end_as_rank

class Last:
    def __del__(self):  # called by the interpreter's finalization
        print("finalized", flush=True)

tell, last = end_as_rank(), Last()
atexit.register(print, "handler")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
sys.exit(tell(7))
"""


@pytest.mark.parametrize(("ranks", "said"), [(1, ["thread", "handler", "finalized"]), (2, ["thread", "handler"])])
def test_a_rank_ends_with_all_but_the_interpreters_finalization(ranks: int, said: list[str]) -> None:
    environment = {**os.environ, "WORLD_SIZE": str(ranks)}
    done = subprocess.run([sys.executable, "-c", RANK], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.split(), done.stderr) == (7, said, "")


def test_bad_input_is_one_line_before_the_script_starts(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise AssertionError('started')")
    (tmp_path / "empty").mkdir()
    for flags, words in (
        (["--data", str(tmp_path / "empty")], "a folder without images"),
        (["--data", str(data), "--stop-on", "copying"], "stop_on is 'copying'; expected one of turning, memorizing"),
        (["--data", str(data), "--every", "0"], "schedule is 0; expected a number of images >= 1"),
        (["--data", str(data), "--sigma", "-1"], "sigmas is (-1.0,); expected positive finite numbers"),
    ):
        assert main([*flags, "--output-dir", str(tmp_path / "out"), str(script)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
    assert not (tmp_path / "out").exists()
    said = run_here(tmp_path, "latent", "--channels", "4", ours=("--data", str(data)))
    assert str(said).endswith("the network is a UNet2DModel with 4 channels; expected one of square images, grey or RGB")

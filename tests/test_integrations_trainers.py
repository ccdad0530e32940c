"""Callbacks on the libraries' own Trainers, and the watch in a plain loop: a tiny U-Net on digits."""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlflow_icr import EDMDenoiser, ICRMonitor, Protocol, SchedulerDenoiser
from mlflow_icr.integrations.watch import ICRWatch
from mlflow_icr.monitoring.schedule import measuring_steps
from mlflow_icr.monitoring.verdict import folded
from mlflow_icr.tracking import read_history
from tests.loop import my_loop
from tests.test_tracking import journal_scalars, mlflow_scalars

PROTOCOL = Protocol(num_views=4, num_images=32)
pytestmark = pytest.mark.usefixtures("few_errors")


def loss_of(network: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    x = images.float() / 127.5 - 1
    sigma = torch.rand(len(x), generator=generator) + 0.1
    noise = torch.randn(x.shape, generator=generator) * sigma.view(-1, 1, 1, 1)
    return (EDMDenoiser(network)(x + noise, sigma) - x).square().mean()


def the_run(status: str) -> Any:
    import mlflow

    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.info.status == status
    return run


def same_everywhere(folder: Path, status: str = "FINISHED") -> Any:
    run = the_run(status)
    stored, journal = mlflow_scalars(run.info.run_id), journal_scalars(folder)
    assert {key: stored[key] for key in journal} == journal
    assert run.data.tags["verdict"]
    assert run.data.params["protocol_digest"] == run.data.params["protocol_digest"].lower()
    return run


def values_of(network: nn.Module, images: Tensor) -> float:
    return ICRMonitor(EDMDenoiser(network), images, PROTOCOL).measure(0).values["repr/icr"]


def test_a_plain_loop_is_watched(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, small_unet: nn.Module, digits: Tensor
) -> None:
    import mlflow

    network = copy.deepcopy(small_unet)
    optimizer, generator = torch.optim.Adam(network.parameters(), 1e-3), torch.Generator().manual_seed(0)
    with ICRWatch(EDMDenoiser(network), digits, tmp_path, schedule=100, protocol=PROTOCOL) as watch:
        for step in range(6):
            watch(64 * step)
            loss = loss_of(network, digits, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        watch.images_seen = 384
    # Reached at 0, 128 (100), 256 (200), 320 (300); and the end.
    rows = read_history(tmp_path)
    assert [row["images_seen"] for row in rows] == [0, 128, 256, 320, 384]
    assert rows[-1]["repr/icr"] == values_of(network, digits)
    run_id = same_everywhere(tmp_path).info.run_id
    written = (tmp_path / "report" / "index.html").read_bytes()
    sent = mlflow.MlflowClient().download_artifacts(run_id, "report/index.html", str(tmp_path_factory.mktemp("sent")))
    assert Path(sent).read_bytes() == written
    # An interrupted one goes on in the same run, with growth relative to the same measurement.
    reference = read_history(tmp_path)[-1]["repr/fisher_residual_growth"]
    watch = ICRWatch(EDMDenoiser(network), digits, tmp_path, schedule=[450], protocol=PROTOCOL, resume=True, images_seen=384)

    def fail() -> None:
        with watch:
            watch(450)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert read_history(tmp_path)[-1]["repr/fisher_residual_growth"] == pytest.approx(reference, rel=1e-9)
    same_everywhere(tmp_path, "FAILED")
    with pytest.raises(ValueError, match=r"protocol_digest is .*, but .* has"):
        ICRWatch(EDMDenoiser(network), digits, tmp_path, protocol=Protocol(num_views=5), resume=True)


def test_the_loop_of_the_documents_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
    block = re.search(r"<!-- watch -->\n```python\n(.*?)```", document, re.S)
    assert block
    monkeypatch.chdir(tmp_path)
    exec(compile(block.group(1), "integrations.md", "exec"), my_loop(steps=5))  # 25 000 images a step
    assert [row["images_seen"] for row in read_history(tmp_path / "outputs" / "mine")] == [25_000, 50_000, 100_000, 125_000]
    same_everywhere(tmp_path / "outputs" / "mine")


def test_a_watch_refuses_before_it_begins(tmp_path: Path, small_unet: nn.Module, digits: Tensor) -> None:
    for wrong, words in (
        ({"schedule": [5, 5]}, r"schedule is \[5, 5\]; expected increasing"),
        ({"stop_on": "undecided"}, "stop_on is 'undecided'; expected one of turning, memorizing"),
        ({"protocol": Protocol(layer="nowhere")}, "layer is 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=words):
            ICRWatch(EDMDenoiser(small_unet), digits, tmp_path / "out", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_geometric_schedule_has_three_points_in_each_doubling() -> None:
    steps = measuring_steps()
    points = [next(steps) for _ in range(20)]
    assert points[:2] == [0, 2000]
    assert [points[i + 3] / points[i] for i in range(1, 17)] == pytest.approx([2] * 16, rel=1e-3)  # rounded to images


def lightning_module(package: str, network: nn.Module) -> Any:
    pl = importlib.import_module(package)

    class Module(pl.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.unet = copy.deepcopy(network)
            self.generator = torch.Generator().manual_seed(0)
            self.fails_at = -1

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == self.fails_at:
                raise RuntimeError("diverged")
            return loss_of(self.unet, batch["images"], self.generator)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-3)

    return Module()


def lightning_trainer(package: str, folder: Path, **arguments: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return importlib.import_module(package).Trainer(default_root_dir=str(folder), **quiet, **arguments)


def batches(images: Tensor) -> Any:
    return torch.utils.data.DataLoader([{"images": image} for image in images], batch_size=16)  # type: ignore[arg-type]


@pytest.mark.parametrize("package", ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.slow)])
def test_lightning_is_watched_and_resumes(tmp_path: Path, small_unet: nn.Module, digits: Tensor, package: str) -> None:
    pytest.importorskip(package)
    from mlflow_icr.integrations.lightning import ICRCallback

    def callback() -> Any:
        return ICRCallback(EDMDenoiser, digits, tmp_path / "out", "unet", schedule=32, protocol=PROTOCOL, num_samples=4)

    module = lightning_module(package, small_unet)
    trainer = lightning_trainer(package, tmp_path, max_steps=5, callbacks=[callback()], enable_checkpointing=False)
    trainer.fit(module, batches(digits))
    trainer.save_checkpoint(tmp_path / "checkpoint.ckpt")
    rows = read_history(tmp_path / "out")
    assert [row["images_seen"] for row in rows] == [0, 32, 64, 80]
    assert rows[0]["repr/icr"] == pytest.approx(values_of(small_unet, digits), rel=1e-6)
    assert rows[-1]["repr/icr"] == values_of(module.unet, digits)
    assert "mem/ratio_l2" in rows[-1]
    same_everywhere(tmp_path / "out")

    trainer = lightning_trainer(package, tmp_path, max_steps=8, callbacks=[callback()], enable_checkpointing=False)
    module.fails_at = 7
    with pytest.raises(RuntimeError, match="diverged"):
        trainer.fit(module, batches(digits), ckpt_path=tmp_path / "checkpoint.ckpt", weights_only=False)
    assert [row["images_seen"] for row in read_history(tmp_path / "out")] == [0, 32, 64, 80, 96]
    run = same_everywhere(tmp_path / "out", "FAILED")
    assert run.data.params["weights"] == "raw"


def test_lightnings_own_average_is_measured_and_a_verdict_stops_it(
    tmp_path: Path, small_unet: nn.Module, digits: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import EMAWeightAveraging

    from mlflow_icr.integrations.lightning import ICRCallback

    # A memorizing history before it: the verdict is that of the whole history.
    history = [
        {"images_seen": 2**k, "repr/view_error_ratio": 1.0 * 2**k, "repr/view_error_ratio_high": 1.01 * 2**k} for k in range(5)
    ]
    average = EMAWeightAveraging(decay=0.5)
    callback = ICRCallback(EDMDenoiser, digits, tmp_path / "out", "unet", schedule=32, protocol=PROTOCOL, stop_on="turning")
    module = lightning_module("lightning.pytorch", small_unet)
    trainer = lightning_trainer(
        "lightning.pytorch", tmp_path, max_steps=20, callbacks=[average, callback], enable_checkpointing=False
    )
    begin = callback.on_train_start

    def with_a_past(*arguments: Any) -> None:
        begin(*arguments)
        callback.watch.tracker.journal.rows[:] = history
        callback.watch.tracker._verdicts = folded(history)

    monkeypatch.setattr(callback, "on_train_start", with_a_past)
    raw, averaged = [], []
    see = callback.on_train_batch_end

    def and_look(*arguments: Any) -> None:
        see(*arguments)
        raw.append(values_of(module.unet, digits))
        averaged.append(values_of(average._average_model.module.unet, digits))

    monkeypatch.setattr(callback, "on_train_batch_end", and_look)
    trainer.fit(module, batches(digits))
    assert trainer.global_step == 2  # 32 images, the first measurement after the past
    assert read_history(tmp_path / "out")[-1]["repr/icr"] == pytest.approx(averaged[-1], rel=1e-6)
    assert raw[-1] != pytest.approx(averaged[-1], rel=1e-4)
    assert the_run("FINISHED").data.params["weights"] == "average"


class WithLoss(nn.Module):
    """A model as transformers' Trainer wants it, with diffusers' average beside its network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        from diffusers.training_utils import EMAModel

        self.unet = copy.deepcopy(network)
        self.average = EMAModel(self.unet.parameters(), decay=0.5)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.average.step(self.unet.parameters())
        return {"loss": loss_of(self.unet, images, self.generator)}


def test_transformers_is_watched_on_an_average(tmp_path: Path, small_unet: nn.Module, digits: Tensor) -> None:
    from transformers import Trainer, TrainingArguments

    from mlflow_icr.integrations.transformers import ICRCallback

    def train(steps: int, resume: bool) -> WithLoss:
        model = WithLoss(small_unet)
        arguments = TrainingArguments(
            str(tmp_path / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            use_cpu=True,
            report_to="none",
            save_steps=4,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        callback = ICRCallback(
            EDMDenoiser, digits, tmp_path / "out", "unet", "average", schedule=32, protocol=PROTOCOL, params={"mine": 1}
        )
        data: Any = [{"images": image} for image in digits]
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train(resume_from_checkpoint=resume)
        return model

    model = train(5, False)
    assert [row["images_seen"] for row in read_history(tmp_path / "out")] == [0, 32, 64, 80]
    averaged = copy.deepcopy(small_unet)
    model.average.copy_to(averaged.parameters())
    assert read_history(tmp_path / "out")[-1]["repr/icr"] == pytest.approx(values_of(averaged, digits), rel=1e-6)
    run = same_everywhere(tmp_path / "out")
    assert (run.data.params["weights"], run.data.params["mine"]) == ("average", "1")
    train(6, True)  # from the checkpoint at step 4
    assert [row["images_seen"] for row in read_history(tmp_path / "out")] == [0, 32, 64, 80, 96]
    same_everywhere(tmp_path / "out")


def test_a_path_that_is_not_there_is_named(tmp_path: Path, small_unet: nn.Module, digits: Tensor) -> None:
    from diffusers import DDPMScheduler

    from mlflow_icr.integrations.settings import WatchSettings

    settings = WatchSettings(lambda n: SchedulerDenoiser(n, DDPMScheduler()), digits, tmp_path / "out", "net")
    with pytest.raises(ValueError, match=r"network is 'net', which WithLoss does not have; expected .* such as one of unet"):
        settings.watch(WithLoss(small_unet))
    with pytest.raises(ValueError, match="num_samples is -1"):
        WatchSettings(EDMDenoiser, digits, tmp_path / "out", num_samples=-1)

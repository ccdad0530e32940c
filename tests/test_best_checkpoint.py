"""The checkpoint to keep is kept, and found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mlflow_icr import EDMDenoiser, ICRMonitor, Protocol, Report, best_checkpoint, verdict
from mlflow_icr.cli import main
from mlflow_icr.extraction.pipelines import load_denoiser
from mlflow_icr.monitoring.verdict import may_be_kept
from mlflow_icr.tracking import MLflowSink, Tracker
from mlflow_icr.tracking.checkpoints.folder import checkpoint_path, checkpoints, remove_old
from tests.checkpoint_runs import models_of, trained
from tests.test_verdict import history


def test_the_best_checkpoint_of_a_run_and_of_a_folder(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import DiffusionPipeline

    folder = tmp_path / "run"
    run_id = str(trained(folder, pipeline).run_id)
    for place in (run_id, str(folder)):
        for flags, step in (([], 300), (["--metric", "repr/icr"], 200), (["--metric", "repr/icr", "--max"], 0)):
            to = tmp_path / "got" / f"{len(place)}-{step}"
            assert main(["best-checkpoint", place, *flags, "--output", str(to)]) == 0
            said = capsys.readouterr()
            assert said.out == f"{to}\n"
            assert f"{step} images seen" in said.err
            loaded = DiffusionPipeline.from_pretrained(to)
            assert type(loaded).__name__ == "ConsistencyModelPipeline"
            assert not (to / "state.safetensors").exists()
        assert (best_checkpoint(place, metric="repr/icr") / "model_index.json").exists()
    assert best_checkpoint(folder) == checkpoint_path(folder, 300)
    shutil.rmtree(checkpoint_path(folder, 200))
    assert main(["best-checkpoint", str(folder), "--metric", "repr/icr"]) == 0
    assert (
        "100 images seen, repr/icr 0.3, the lowest of the checkpoints there are; it was 0.2 at 200" in capsys.readouterr().err
    )


def test_a_checkpoint_is_evaluated_by_its_address(pipeline: Path, tmp_path: Path, digits: torch.Tensor) -> None:
    import mlflow
    import pandas as pd
    from PIL import Image

    model = models_of(trained(tmp_path / "run", pipeline).run_id)[300]
    paths = [str(tmp_path / f"{i}.png") for i in range(len(digits))]
    for path, image in zip(paths, digits, strict=True):
        Image.fromarray(image[0].numpy()).save(path)
    config = {"num_views": 4, "num_images": 32, "num_samples": 0}
    with mlflow.start_run() as run:
        result = mlflow.models.evaluate(
            model=f"models:/{model.model_id}",
            data=pd.DataFrame({"image": paths}),
            model_type="diffusion",
            evaluators="icr",
            evaluator_config=config,
        )
    denoiser = EDMDenoiser(load_denoiser(pipeline)[0].network)
    expected = ICRMonitor(denoiser, digits, Protocol(num_views=4, num_images=32)).measure(300)
    for key in ("repr/icr", "repr/icr_debiased", "repr/trace_residual"):
        assert result.metrics[key] == pytest.approx(expected.values[key], rel=1e-9)
    assert result.artifacts["protocol"].content["images_seen"] == 300  # the model says so itself
    client = mlflow.MlflowClient()
    there = {(metric.key, metric.run_id) for metric in client.get_logged_model(model.model_id).metrics}
    assert {("repr/icr", run.info.run_id), ("repr/icr", model.source_run_id)} <= there
    assert client.get_run(run.info.run_id).data.metrics["repr/icr"] == result.metrics["repr/icr"]


def test_what_is_wrong_with_a_best_checkpoint_is_one_line(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = str(trained(tmp_path / "run", pipeline).run_id)
    bare = MLflowSink(log_models="none")
    tracker = Tracker(tmp_path / "bare", [bare])
    tracker.open({}, {})
    tracker.record(Report(0, {"repr/icr": 0.5}))
    tracker.close("FINISHED")
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    shutil.rmtree(checkpoint_path(tmp_path / "damaged", 300))
    wrong = {
        ("f" * 32,): f"run is '{'f' * 32}', which is no folder, and no run of the tracking store; expected either",
        ("outputs/onee",): "run is 'outputs/onee'; expected an output folder that is there, or the id of an MLflow run",
        (str(tmp_path),): f"run is '{tmp_path}', which holds no history.jsonl; expected the output folder of one run",
        (str(bare.run_id),): f"run is '{bare.run_id}', which has no checkpoints; expected a run with checkpoints",
        (str(tmp_path / "bare"),): "which has 1 checkpoints without their weights; expected a run with checkpoints",
        (str(tmp_path / "damaged"),): "keeps the checkpoint at 300 images seen, which is gone; there are 0, 100, 200",
        (run_id, "--metric", "repr/icy"): (
            f"metric is 'repr/icy', which no checkpoint of '{run_id}' has; expected one of loss/train, mem/ratio_l2, repr/icr"
        ),
        (run_id, "--max"): "max is given without metric; expected --metric KEY",
        (run_id, "--output", str(tmp_path / "run")): "/run', which is there already; expected a new folder",
    }  # fmt: skip
    for arguments, message in wrong.items():
        assert main(["best-checkpoint", *arguments]) == 2
        said = capsys.readouterr()
        assert message in said.err
        assert said.err.splitlines()[-1].startswith("mlflow-icr: error: ")
        assert said.out == ""


def test_somebody_elses_training_has_checkpoints_too(small_unet: torch.nn.Module, digits: torch.Tensor, tmp_path: Path) -> None:
    from diffusers import ConsistencyModelPipeline, EDMDPMSolverMultistepScheduler

    from mlflow_icr import Protocol
    from mlflow_icr.integrations.watch import ICRWatch

    folder = tmp_path / "run"
    saved = ConsistencyModelPipeline(unet=small_unet, scheduler=EDMDPMSolverMultistepScheduler(sigma_data=0.5)).save_pretrained
    with ICRWatch(
        EDMDenoiser(small_unet), digits[:8], folder, schedule=10, protocol=Protocol(num_images=8, num_views=2),
        pictures=False, save=saved, checkpoints_total_limit=1,
    ) as watch:  # fmt: skip
        for images_seen in (10, 20, 30):
            watch(images_seen)
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    assert set(models_of(run_id)) == {10, 20, 30}
    assert models_of(run_id)[30].tags["weights"] == "uploaded"
    assert set(checkpoints(folder)) == {30, *may_be_kept(folder)}
    assert best_checkpoint(folder) == checkpoint_path(folder, 30)


@pytest.mark.parametrize(("early", "late", "icr_rise"), [(0.3, 0.9, 0.0), (0.3, 0.3, 0.2), (0.3, 0.9, 0.2), (0.25, 0.25, 0.0)])
def test_what_a_verdict_will_keep_is_foreseen(early: float, late: float, icr_rise: float) -> None:
    """A turn is seen when it is past: by then its checkpoint must not have been removed."""
    for wobble in (0.0, 0.05):
        rows = history(early, late, icr_rise=icr_rise, wobble=wobble)
        for end in range(1, len(rows) + 1):
            kept = verdict(rows[:end]).checkpoint_images_seen
            for start in range(1, end + 1):
                newest = rows[start - 1]["images_seen"]
                assert kept is not None
                assert kept > newest or kept in {newest, *may_be_kept(rows[:start])}
                assert len(may_be_kept(rows[:start])) <= 3


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_old_checkpoints_go_but_never_those_to_keep(limit: int, tmp_path: Path) -> None:
    def save(step: int) -> None:
        path = checkpoint_path(tmp_path, step)
        path.mkdir(parents=True)
        (path / "model_index.json").write_text("{}")

    for step in range(0, 600, 100):
        save(step)
        remove_old(tmp_path, limit, {200})
    assert (
        list(checkpoints(tmp_path))
        == {0: [0, 100, 200, 300, 400, 500], 1: [200, 500], 2: [200, 500], 3: [200, 400, 500]}[limit]
    )
    assert not list((tmp_path / "checkpoints").glob(".*"))

"""What MLflow makes of the installed package: `test_plugin.py` runs this, in an environment with the wheel and a store."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import mlflow
import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image

import mlflow_icr
from mlflow_icr import EDMDenoiser, GenerationMonitor, ICRMonitor, Protocol
from mlflow_icr.extraction.images import content_hash
from mlflow_icr.plugin.pipeline import log_pipeline

TIMES = {"perf/measure_seconds", "perf/generate_seconds"}
CONFIG = {"sigma": 0.4, "num_views": 6, "num_samples": 12, "num_steps": 4, "seed": 3}


@pytest.fixture(autouse=True)
def client(tmp_path: Path) -> mlflow.MlflowClient:
    mlflow.set_experiment(experiment_id=mlflow.create_experiment(tmp_path.name, artifact_location=f"{tmp_path}/artifacts"))
    return mlflow.MlflowClient()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy((load_digits().images[:60] * 255 / 16).round().astype(np.uint8))[:, None]


@pytest.fixture
def folders(tmp_path: Path, images: torch.Tensor) -> dict[str, Path]:
    found = {"train": tmp_path / "train", "heldout": tmp_path / "heldout"}
    for name, some in (("train", images[:40]), ("heldout", images[40:])):
        found[name].mkdir()
        for i, image in enumerate(some):
            Image.fromarray(image[0].numpy()).save(found[name] / f"{i:03d}.png")
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the trainers save: a pipeline, and beside it the state that training goes on from."""
    from diffusers import ConsistencyModelPipeline, EDMDPMSolverMultistepScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        add_attention=False,
    )
    folder = tmp_path_factory.mktemp("checkpoint") / "000000001000"
    ConsistencyModelPipeline(unet, EDMDPMSolverMultistepScheduler(sigma_data=0.5)).save_pretrained(folder)
    (folder / "state.safetensors").write_bytes(b"large")
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint: Path, images: torch.Tensor) -> dict[str, float]:
    """The same measurement by the library's own monitors."""
    from diffusers import UNet2DModel

    denoiser = EDMDenoiser(UNet2DModel.from_pretrained(checkpoint / "unet", use_safetensors=True), 0.5)
    protocol = Protocol(sigmas=(0.4,), num_views=6, seed=3)
    generation = GenerationMonitor(denoiser, images[:40], images[40:], num_samples=12, num_steps=4, seed=3)
    values = ICRMonitor(denoiser, images[:40], protocol).measure(0).joined(generation.measure(0)).values
    return {key: value for key, value in values.items() if key not in TIMES}


def same(metrics: dict[str, float], expected: dict[str, float]) -> None:
    # Same process, same code, same seeds: equal up to the order in which threads sum.
    assert {key: metrics[key] for key in metrics if key not in TIMES} == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_the_package_is_the_wheels() -> None:
    assert Path(mlflow_icr.__file__).is_relative_to(sys.prefix)


def test_a_logged_pipeline_is_evaluated_by_its_address(
    client: mlflow.MlflowClient, checkpoint: Path, folders: dict[str, Path], expected: dict[str, float], tmp_path: Path
) -> None:
    info = log_pipeline(checkpoint, name="digits")
    with mlflow.start_run() as run:
        result = mlflow.models.evaluate(
            model=info.model_uri,
            data=pd.DataFrame({"seed": range(2)}),
            model_type="diffusion",
            evaluators="icr",
            evaluator_config=CONFIG | {"train": str(folders["train"]), "heldout": folders["heldout"]},
        )
    same(result.metrics, expected)
    stored = client.get_run(run.info.run_id)
    same(stored.data.metrics, expected)
    same({m.key: m.value for m in mlflow.get_logged_model(info.model_id).metrics}, expected)
    assert all(len(client.get_metric_history(run.info.run_id, key)) == 1 for key in expected), "logged twice"
    assert stored.data.tags["absent.mem/carlini"] == "needs 50 training images; there are 40"
    assert {e.tags[0].value: e.dataset.name for e in stored.inputs.dataset_inputs if e.tags} == {
        "training": "train",
        "validation": "heldout",
    }

    names = {"neighbours_s", "neighbours_xi", "largest_residuals", "samples", "nearest", "distances", "protocol"}
    assert set(result.artifacts) == names
    protocol = result.artifacts["protocol"].content
    assert protocol["protocol"]["num_images"] == 40
    assert protocol["protocol_digest"] == stored.data.tags["icr.protocol_digest"]
    for artifact in result.artifacts.values():
        local = Path(mlflow.artifacts.download_artifacts(artifact.uri))
        assert json.loads(local.read_text()) == protocol if local.suffix == ".json" else Image.open(local).size[0] > 100
    result.save(tmp_path / "saved")
    again = mlflow.models.EvaluationResult.load(tmp_path / "saved")
    assert again.metrics == result.metrics
    assert again.artifacts["protocol"].content == protocol


def test_a_folder_of_images_is_data_and_a_checkpoint_needs_no_logging(
    client: mlflow.MlflowClient, checkpoint: Path, folders: dict[str, Path], expected: dict[str, float], tmp_path: Path
) -> None:
    data = mlflow.data.from_image_folder(folders["train"])
    config = CONFIG | {"heldout": folders["heldout"], "pipeline": checkpoint}
    # No evaluator is named: that of the model type is found.
    result = mlflow.models.evaluate(data=data, model_type="diffusion", evaluator_config=config)
    same(result.metrics, expected)
    (stored,) = client.search_runs([mlflow.get_experiment_by_name(tmp_path.name).experiment_id])
    same(stored.data.metrics, expected)  # logged by the evaluator: there is no model to log them for
    assert {e.dataset.digest for e in stored.inputs.dataset_inputs if not e.tags} == {data.digest}
    assert list((Path(stored.info.artifact_uri) / "icr").glob("history.jsonl"))


def test_rows_of_pixels_are_data_and_icr_alone_needs_no_samples(
    checkpoint: Path, images: torch.Tensor, expected: dict[str, float]
) -> None:
    result = mlflow.models.evaluate(
        data=mlflow.data.from_tensor(images[:40]),
        model_type="diffusion",
        evaluators="icr",
        evaluator_config=CONFIG | {"pipeline": checkpoint, "num_samples": 0},
    )
    same(result.metrics, {key: value for key, value in expected.items() if key.startswith("repr/")})


def test_a_logged_pipeline_samples_what_an_evaluation_samples(checkpoint: Path, images: torch.Tensor) -> None:
    from mlflow_icr.extraction.pipelines import load_denoiser

    info = log_pipeline(checkpoint)
    assert not list(Path(mlflow.artifacts.download_artifacts(info.model_uri)).rglob("state.safetensors"))
    model = mlflow.pyfunc.load_model(info.model_uri)
    sampled = model.predict({"num_images": 5, "seed": 0})[[4, 0]]
    assert np.array_equal(model.predict(pd.DataFrame({"num_images": [5]}))[[4, 0]], sampled)
    with pytest.raises(MlflowException, match="Failed to enforce schema of data"):
        model.predict({"seed": ["four"]})
    monitor = GenerationMonitor(load_denoiser(checkpoint)[0], images, num_samples=5)
    assert sampled.dtype == np.uint8
    difference = sampled.astype(int) - monitor.sample()[[4, 0]].permute(0, 2, 3, 1).numpy()
    assert abs(difference).max() <= 1  # batches of two and of five round differently


def test_anybodys_wrapper_and_a_bare_folder_are_evaluated_too(
    checkpoint: Path, images: torch.Tensor, expected: dict[str, float], tmp_path: Path, client: mlflow.MlflowClient
) -> None:
    code = tmp_path / "wrapper.py"
    code.write_text(
        "import mlflow\n"
        "class Wrapper(mlflow.pyfunc.PythonModel):\n"
        "    def predict(self, context, model_input, params=None):\n"
        "        return model_input\n"
        "mlflow.models.set_model(Wrapper())\n"
    )
    wrapped = mlflow.pyfunc.log_model(
        name="theirs",
        python_model=str(code),
        artifacts={"notes": str(code), "net": str(checkpoint)},
        pip_requirements=["mlflow"],
    )
    bare = mlflow.initialize_logged_model(name="bare")
    client.log_model_artifacts(bare.model_id, str(checkpoint))
    mlflow.finalize_logged_model(bare.model_id, "READY")
    for given, config in (
        ({"model": mlflow.pyfunc.load_model(wrapped.model_uri)}, {}),
        ({"model_id": bare.model_id}, {"pipeline": f"models:/{bare.model_id}"}),
    ):
        result = mlflow.models.evaluate(
            **given,
            data=mlflow.data.from_tensor(images[:40]),
            model_type="diffusion",
            evaluators=["icr"],
            evaluator_config={"icr": CONFIG | config | {"num_samples": 0}},
        )
        same(result.metrics, {key: value for key, value in expected.items() if key.startswith("repr/")})
    assert len(mlflow.get_logged_model(bare.model_id).metrics) == len(result.metrics)


def test_other_models_are_left_alone(client: mlflow.MlflowClient) -> None:
    data = pd.DataFrame({"x": [1.0, 2.0, 3.0], "y": [2.0, 4.0, 6.0]})
    result = mlflow.models.evaluate(
        lambda frame: 2 * frame["x"], data, targets="y", model_type="regressor", evaluator_config={"log_explainer": False}
    )
    assert result.metrics["root_mean_squared_error"] == 0
    assert not [key for key in result.metrics if key.startswith("repr/")]


def test_bad_input_gets_one_line_that_names_it(checkpoint: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "ddpm"
    shutil.copytree(checkpoint, other)
    (other / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "ScoreSdeVeScheduler"}')
    (tmp_path / "colour").mkdir()
    Image.new("RGB", (8, 8), (9, 0, 200)).save(tmp_path / "colour" / "a.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    good = {"train": str(folders["train"]), "pipeline": str(checkpoint)}
    seeds, files = pd.DataFrame({"seed": [0]}), pd.DataFrame({"path": [str(folders["train"] / "000.png")]})
    for data, change, message in (
        (seeds, {"num_image": 5}, "evaluator_config's key is 'num_image'; expected one of augmentation_level, batch_size"),
        (seeds, {"train": str(tmp_path / "none")}, "train is '.*none'; expected a folder, or a .zip or .npz file"),
        (seeds, {"train": None}, "train is not given; expected a folder"),
        (files, {}, "train is '.*train'; expected nothing where data are images already"),
        (files.replace("000.png", "nowhere.png", regex=True), {"train": None}, "holds no images.*nowhere.png"),
        (seeds, {"train": str(tmp_path / "colour")}, "train images have 3 channel.*; the network takes 1"),
        (seeds, {"train": str(tmp_path / "broken")}, "holds no images .*a.png"),
        (seeds, {"heldout": 3}, "heldout is 3; expected a folder"),
        (seeds, {"num_samples": -1}, "num_samples is -1; expected a whole number >= 0"),
        (seeds, {"num_images": 41}, "num_images is 41; expected 2 to 40"),
        (seeds, {"num_views": "6"}, "num_views is '6'; expected a whole number >= 2"),
        (seeds, {"sigma": None}, "sigmas is None; expected positive finite numbers"),
        (seeds, {"sigma": 1.0, "sigmas": [1.0]}, "sigma is 1.0; expected nothing where sigmas is given"),
        (seeds, {"layer": "nowhere"}, "layer is 'nowhere'"),
        (seeds, {"seed": 1.5}, "seed is 1.5; expected a whole number >= 0"),
        (seeds, {"encoder": "vgg"}, "encoder is 'vgg'; expected one of pixels"),
        (seeds, {"companions": "rankme"}, "companions is 'rankme'; expected a list of names"),
        (seeds, {"companions": ["rank"]}, "rank"),
        (seeds, {"projection": 4}, "images_seen is 0; expected a number > 0 where projection is given"),
        (seeds, {"device": "tpu9"}, "device is 'tpu9'; expected cpu"),
        (seeds, {"pipeline": None}, "model and evaluator_config's pipeline: neither given"),
        (seeds, {"pipeline": str(tmp_path / "colour")}, "pipeline is '.*colour', which holds 0 diffusers folders"),
        (seeds, {"pipeline": "models:/nothing/1"}, "pipeline is 'models:/nothing/1', which cannot be downloaded"),
        (
            seeds,
            {"pipeline": "ftp://user:hunter2@127.0.0.1:9/x"},
            "pipeline is 'ftp://127.0.0.1:9/x', which cannot be downloaded",
        ),
        (seeds, {"pipeline": str(other)}, "scheduler is a ScoreSdeVeScheduler; expected DDPMScheduler or one of its kind"),
    ):
        with pytest.raises(MlflowException, match=message) as caught:
            mlflow.models.evaluate(data=data, model_type="diffusion", evaluators="icr", evaluator_config={**good, **change})
        assert str(caught.value).startswith("evaluator icr: ")
        assert "\n" not in str(caught.value), change
        assert "hunter2" not in str(caught.value)
    with pytest.raises(MlflowException, match="model has 0 diffusers folders among its artifacts"):
        mlflow.models.evaluate(
            lambda frame: frame, seeds, model_type="diffusion", evaluators="icr", evaluator_config={"train": good["train"]}
        )


def test_a_server_that_takes_nothing_costs_no_measurement(
    checkpoint: Path, folders: dict[str, Path], expected: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = CONFIG | {"train": folders["train"], "heldout": folders["heldout"], "pipeline": checkpoint}
    with mlflow.start_run():
        shutil.rmtree(tmp_path / "artifacts", ignore_errors=True)
        (tmp_path / "artifacts").write_text("no folder any more")
        with pytest.raises(MlflowException, match=r"does not take results .*; they are in ") as caught:
            mlflow.models.evaluate(data=pd.DataFrame({"seed": [0]}), model_type="diffusion", evaluator_config=config)
    left = Path(str(caught.value).rsplit(" ", 1)[1])
    row = json.loads((left / "history.jsonl").read_text())
    shutil.rmtree(left)
    same({key: value for key, value in row.items() if key != "images_seen"}, expected)


def test_datasets_are_read_again_through_the_runs_inputs(
    client: mlflow.MlflowClient, folders: dict[str, Path], images: torch.Tensor
) -> None:
    folder, tensor = mlflow.data.from_image_folder(folders["train"]), mlflow.data.from_tensor(images, name="digits")
    with mlflow.start_run() as run:
        mlflow.log_input(folder, context="training")
        mlflow.log_input(folder, context="training")
        mlflow.log_input(tensor, context="validation")
    inputs = {entry.dataset.name: entry for entry in client.get_run(run.info.run_id).inputs.dataset_inputs}
    assert set(inputs) == {"train", "digits"}
    place = mlflow.data.get_source(inputs["train"]).load()
    assert mlflow.data.from_image_folder(place).digest == inputs["train"].dataset.digest
    assert inputs["digits"].dataset.digest == content_hash(images)[:36]
    profile = json.loads(inputs["train"].dataset.profile)
    assert (profile["num_images"], profile["shape"], profile["sizes"]) == (40, [40, 1, 8, 8], {"8x8": 40})
    for entry, shape in ((inputs["train"], [-1, 1, 8, 8]), (inputs["digits"], [-1, 1, 8, 8])):
        features = json.loads(json.loads(entry.dataset.schema)["mlflow_tensorspec"]["features"])
        assert features[0]["tensor-spec"] == {"dtype": "uint8", "shape": shape}

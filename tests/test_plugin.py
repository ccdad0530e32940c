"""MLflow's entry points, through MLflow, in an environment that has the wheel installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlflow_icr import environment
from mlflow_icr.plugin.datasets import from_image_folder, from_tensor
from tests.stores import new_store

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment: this package from its wheel, and all others from where the tests run."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # building leaves files behind
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "docs", "tests"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, cwd=folder)
    venv.create(folder / "env", with_pip=False)
    found = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", str(found), "install", "--no-deps", "--no-index", str(wheel)], check=True, cwd=folder)
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    # A plain path, after the environment's own: .pth files there, such as an editable install's, are not read.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    return found


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A new sqlite store."""
    return new_store(tmp_path_factory.mktemp("doors") / "mlflow.db")


def run(python: Path, *arguments: str, cwd: Path, **variables: str) -> str:
    # -I: neither this folder nor PYTHONPATH is searched.
    command = [str(python), "-I", *arguments]
    done = subprocess.run(
        command, cwd=cwd, env={"OMP_NUM_THREADS": "1"} | os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_what_mlflow_makes_of_the_wheel(python: Path, tmp_path: Path, store: str) -> None:
    shutil.copy(ROOT / "tests" / "plugin_checks.py", tmp_path)
    said = run(
        python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "plugin_checks.py", cwd=tmp_path, MLFLOW_TRACKING_URI=store
    )
    assert re.search(r"^10 passed", said, re.M)


@pytest.mark.parametrize("first", ["mlflow", "mlflow_icr.plugin.datasets", "mlflow_icr.plugin.evaluator"])
def test_mlflow_finds_the_doors_and_starts_without_torch(python: Path, tmp_path: Path, store: str, first: str) -> None:
    code = f"""
import {first}, json, sys
import mlflow, mlflow_icr
from importlib.metadata import version
assert mlflow_icr.__file__.startswith(sys.prefix)
from mlflow.models.evaluation.evaluator_registry import _model_evaluation_registry as registry
assert registry.is_registered("icr") and mlflow.data.from_tensor and mlflow.data.from_image_folder
from mlflow_icr.environment import ours
with mlflow.start_run() as theirs:
    pass
assert not [key for key in mlflow.MlflowClient().get_run(theirs.info.run_id).data.tags if key.startswith("icr.")]
with ours(), mlflow.start_run() as started:
    pass
tags = mlflow.MlflowClient().get_run(started.info.run_id).data.tags
assert tags["icr.version"] == mlflow_icr.__version__
for package in ("torch", "accelerate", "diffusers"):
    assert tags["icr." + package] == version(package)
assert tags["icr.world_size"] == "4"
assert "icr.gpus" not in tags
assert "torch" not in sys.modules and "diffusers" not in sys.modules
"""
    said = run(python, "-c", code, cwd=tmp_path, MLFLOW_TRACKING_URI=store, WORLD_SIZE="4")
    assert "Failure attempting" not in said


def test_what_is_not_known_is_no_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    tags = environment.environment_tags()
    assert "icr.world_size" not in tags
    assert tags.get("icr.cuda") == torch.version.cuda
    assert ("icr.gpus" in tags) == torch.cuda.is_initialized()
    monkeypatch.delitem(sys.modules, "torch")  # as in a process that has not loaded it
    for version, cuda in (("2.8.0+cu128", "12.8"), ("2.6.0+cu90", "9.0"), ("2.13.0+cpu", None), ("2.13.0", None)):
        monkeypatch.setattr(environment, "_versions", lambda version=version: {"torch": version})
        assert environment.environment_tags().get("icr.cuda") == cuda


def write(folder: Path, names: list[str], images: torch.Tensor) -> Path:
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / name)
    return folder


def test_a_folders_digest_is_of_names_and_bytes(tmp_path: Path, digits: torch.Tensor) -> None:
    names = [f"{i % 2}/{i}.png" for i in range(6)]
    folder = from_image_folder(write(tmp_path / "a", names, digits[:6]))
    write(tmp_path / "b", names[::-1], digits[:6].flip(0))  # made in another order, in another place
    (tmp_path / "b" / "notes.txt").write_text("no image")
    assert from_image_folder(tmp_path / "b").digest == folder.digest
    changed = [folder.digest]
    (tmp_path / "b" / "1" / "1.png").rename(tmp_path / "b" / "1" / "9.png")
    changed.append(from_image_folder(tmp_path / "b").digest)
    swapped = digits[:6].clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    changed.append(from_image_folder(write(tmp_path / "c", names, swapped)).digest)
    (tmp_path / "a" / "0" / "0.png").write_bytes(b"no image")
    broken = from_image_folder(tmp_path / "a")
    changed.append(broken.digest)
    assert len(set(changed)) == 4
    assert all(len(digest) == 36 for digest in changed)
    assert (broken.profile["num_images"], broken.profile["num_unreadable"]) == (5, 1)
    Image.new("RGB", (9, 7)).save(tmp_path / "c" / "odd.png")
    assert from_image_folder(tmp_path / "c").profile["shape"] == [7, -1, -1, -1]
    with pytest.raises(ValueError, match=r"'.*none' is not a folder with images"):
        from_image_folder(tmp_path / "none")


def test_a_tensors_digest_is_of_dtype_shape_and_pixels(digits: torch.Tensor) -> None:
    dataset = from_tensor(digits)
    assert from_tensor(digits.numpy()).digest == dataset.digest
    assert from_tensor(digits.transpose(2, 3).contiguous().transpose(2, 3)).digest == dataset.digest  # other strides
    others = [digits.view(32, 2, 8, 8), digits.view(torch.int8), digits.flip(0), digits.float()]
    assert len({from_tensor(other).digest for other in others} | {dataset.digest}) == 5
    described = json.loads(dataset.to_json())
    assert json.loads(described["profile"]) == {"num_images": 64, "shape": [64, 1, 8, 8], "dtype": "uint8"}
    assert np.array_equal(dataset.to_evaluation_dataset().features_data, digits.flatten(1).numpy())
    for images, message in ((digits[0], r"shape \(1, 8, 8\); expected \(N, C, H, W\)"), (digits.bfloat16(), "bfloat16")):
        with pytest.raises(ValueError, match=message):
            from_tensor(images)
    with pytest.raises(ValueError, match=r"digest is '0{64}'; expected 1 to 36 characters"):
        from_tensor(digits, digest="0" * 64)

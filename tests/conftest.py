"""Shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.stores import new_store
from tests.training import run_here

# The files that take longest come first, so that no core waits for another one at the end.
LONGEST = (
    "test_study", "test_paper", "test_train", "test_plugin", "test_outages", "test_own_data", "test_backfill", "test_engines",
    "test_soak", "test_benchmarks", "test_ranks", "test_tracking_processes", "test_interruptions", "test_export_interruptions",
    "test_family_runs", "test_validation", "test_slurm", "test_families", "test_saving", "test_verdict_of_runs",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by their files; those of a file stay in their order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260609)


@pytest.fixture(autouse=True)
def _no_tracking_leaks(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No test logs into somebody's server, or into this folder; one that writes files finds a new store."""
    for variable in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    uri = new_store(path) if "tmp_path" in request.fixturenames else f"sqlite:///{path}"  # which MLflow would make itself
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)


@pytest.fixture
def quick_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What delivers to a sink that does not answer tries again at once."""
    monkeypatch.setattr("mlflow_icr.tracking.worker.PAUSES", (0.01,))


@pytest.fixture
def few_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of this process, and of those that it starts, denoise 32 images for their error ratios, not 256."""
    import mlflow_icr.monitoring.errors

    monkeypatch.setattr(mlflow_icr.monitoring.errors, "ERROR_IMAGES", 32)
    folder = str(Path(__file__).parent / "few_errors")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH")))))


@pytest.fixture(autouse=True)
def _no_run_left_active() -> Iterator[None]:
    """What a test leaves open, as a killed process would, is not the next test's run."""
    yield
    fluent = sys.modules.get("mlflow.tracking.fluent")
    if fluent is not None:
        fluent._active_run_stack.get().clear()


@pytest.fixture(autouse=True, scope="session")
def _no_embeddings_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or leaves embeddings in somebody's cache."""
    before = os.environ.get("MLFLOW_ICR_CACHE")
    os.environ["MLFLOW_ICR_CACHE"] = str(tmp_path_factory.mktemp("embeddings"))
    yield
    os.environ.pop("MLFLOW_ICR_CACHE")
    if before is not None:
        os.environ["MLFLOW_ICR_CACHE"] = before


@pytest.fixture(scope="session")
def small_unet() -> torch.nn.Module:
    """A randomly initialised UNet2DModel for 1x8x8 images, D = 32 at its decoder."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
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


@pytest.fixture
def digits() -> torch.Tensor:
    """64 digits, (64, 1, 8, 8) uint8."""
    from sklearn.datasets import load_digits

    return torch.from_numpy((load_digits().images[:64] * 255 / 16).round().astype(np.uint8))[:, None]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One uninterrupted short run, and its store."""
    folder = tmp_path_factory.mktemp("whole")
    store = new_store(folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        done = run_here(folder / "run", "--tag=study=s1")
    assert done.returncode == 0, done.stderr
    assert "finished: lowest ICR" in done.stdout
    return folder / "run", store


@pytest.fixture
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store in the folder of the test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "mlflow.db"))


@pytest.fixture(scope="session")
def pipeline(small_unet: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with what a trainer keeps beside it."""
    from diffusers import ConsistencyModelPipeline, EDMDPMSolverMultistepScheduler

    folder = tmp_path_factory.mktemp("pipeline") / "p"
    ConsistencyModelPipeline(unet=small_unet, scheduler=EDMDPMSolverMultistepScheduler(sigma_data=0.5)).save_pretrained(folder)
    (folder / "state.safetensors").write_bytes(b"not for others")
    return folder

"""The house: who may import whom, and how light an import is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up; a module imports from its own floor and from those below it (docs/built/overview.md).
FLOORS = [
    "representation",
    "generation",
    "extraction",
    "monitoring",
    "tracking",
    "bridge",
    "reporting",
    "integrations",
    "plugin",
    "doctor",
    "commands",
    "cli",
]
# These two say what features and samples say, by tensor maths alone: neither knows of the other.
APART = {"representation", "generation"}
# The package's own front door, its version, what it runs on and how commands are read belong to no floor, and import none.
DOORS = {"__init__", "version", "environment", "arguments"}


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_floors_import_only_what_stands_below_them() -> None:
    seen = 0
    for path in (ROOT / "mlflow_icr").rglob("*.py"):
        floor = path.relative_to(ROOT / "mlflow_icr").parts[0].removesuffix(".py")
        for name in imported(path):
            assert not name.startswith("trainers"), f"{path} imports {name}"
            if floor in DOORS or not name.startswith("mlflow_icr."):
                continue
            target = name.split(".")[1]
            if target in DOORS:
                continue
            assert target in FLOORS, f"{path} imports {name}, which is on no floor"
            assert FLOORS.index(target) <= FLOORS.index(floor), f"{path} imports {name} from a floor above"
            assert target == floor or not {target, floor} <= APART, f"{path} imports {name}"
            seen += 1
    assert seen > 20


@pytest.mark.parametrize(("room", "other"), [("mlflow", "tensorboard"), ("tensorboard", "mlflow")])
def test_the_rooms_of_two_trackers_know_nothing_of_each_other(room: str, other: str) -> None:
    paths = list((ROOT / "mlflow_icr" / "tracking" / room).glob("*.py"))
    assert len(paths) > 5
    for path in paths:
        wrong = {name for name in imported(path) if name.startswith(f"mlflow_icr.tracking.{other}")}
        assert not wrong, f"{path} imports {wrong}"


def test_every_module_stands_on_a_floor() -> None:
    for path in (ROOT / "mlflow_icr").rglob("*.py"):
        assert path.relative_to(ROOT / "mlflow_icr").parts[0].removesuffix(".py") in {*FLOORS, *DOORS}, path


@pytest.mark.parametrize("floor", ["representation", "generation"])
def test_the_maths_knows_torch_and_the_scientific_libraries_alone(floor: str) -> None:
    # scipy, scikit-learn and faiss are imported where a function needs them: the last test here looks at what an import loads.
    allowed = {"torch", "mlflow_icr", "scipy", "sklearn", "faiss", *sys.stdlib_module_names}
    for path in (ROOT / "mlflow_icr" / floor).rglob("*.py"):
        assert {name.split(".")[0] for name in imported(path)} <= allowed, path


@pytest.mark.parametrize("module", ["mlflow_icr", "mlflow_icr.representation", "mlflow_icr.generation"])
def test_importing_the_library_loads_no_tracker_and_no_model_zoo(module: str) -> None:
    code = f"import sys; from {module} import *; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())
    assert "torch" in loaded
    assert loaded.isdisjoint(
        {
            "mlflow",
            "accelerate",
            "tensorboard",
            "diffusers",
            "datasets",
            "kornia",
            "matplotlib",
            "PIL",
            "scipy",
            "sklearn",
            "faiss",
        }
    )


def test_the_front_door_opens_without_torch_and_shows_every_name() -> None:
    code = """
import sys, mlflow_icr
assert "torch" not in sys.modules, "MLflow imports mlflow_icr.plugin at every import mlflow"
assert set(mlflow_icr.__all__) <= set(dir(mlflow_icr))
for name in mlflow_icr.__all__:
    getattr(mlflow_icr, name)
assert not hasattr(mlflow_icr, "nothing")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_stay_small() -> None:
    for path in [*(ROOT / "mlflow_icr").rglob("*.py"), *(ROOT / "trainers").rglob("*.py"), *(ROOT / "studies").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path

"""The tutorials: notebooks whose pages show what running them gave. That they run, and that what they claim holds, is slow."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext")

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))


@pytest.fixture(scope="module")
def runner() -> Any:
    spec = importlib.util.spec_from_file_location("run_tutorials", ROOT / "docs" / "run_tutorials.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_three_and_the_site_lists_them() -> None:
    assert len(TUTORIALS) == 3
    nav = (ROOT / "mkdocs.yml").read_text()
    assert all(f"tutorials/{path.stem}.md" in nav for path in TUTORIALS)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_a_notebook_of_names_that_exist(path: Path) -> None:
    notebook = jupytext.read(path, fmt="py:percent")
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown"
    assert kinds.count("code") >= 4
    again = jupytext.reads(jupytext.writes(notebook, fmt="ipynb"), fmt="ipynb")
    assert [cell.source for cell in again.cells] == [cell.source for cell in notebook.cells]
    checks = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        for node in ast.walk(ast.parse(cell.source)):
            checks += isinstance(node, ast.Assert)
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("mlflow_icr", "trainers"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), cell.source
    assert checks >= 3, "a tutorial asserts what its text claims"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_its_page_has_the_same_cells_and_what_running_them_printed(path: Path, runner: Any) -> None:
    page = path.with_suffix(".md").read_text()
    blocks = re.findall(r"```text\n(.*?)\n```", page, re.S)
    cells = runner.cells(path)
    printed = [""] * len(cells)
    place = 0
    for number, (kind, source) in enumerate(cells):
        assert source.split("\n", 1)[-1].strip() in page, "python docs/run_tutorials.py writes the page anew"
        place = page.index(source.split("\n", 1)[-1].strip(), place)
        following = page[place + len(source.split("\n", 1)[-1].strip()) :].removeprefix("\n```\n\n")
        if kind == "code" and following.startswith("```text"):
            printed[number] = blocks.pop(0)
    assert not blocks
    assert any(printed), "the page shows no output"
    assert runner.page(path, printed) == page


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_what_it_claims_holds(path: Path, tmp_path: Path) -> None:
    """Its assertions are those of its text."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

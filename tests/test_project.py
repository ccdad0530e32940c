"""What the repository promises about itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mlflow_icr

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def pins(lines: list[str]) -> dict[str, str]:
    found = (re.match(r"([A-Za-z0-9_.-]+)==([^\s;]+)", line.strip()) for line in lines)
    return {m.group(1).lower().replace("_", "-"): m.group(2) for m in found if m}


def test_conda_and_constraints_pin_the_same_versions() -> None:
    pip = next(d["pip"] for d in yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"] if isinstance(d, dict))
    constraints = pins((ROOT / "constraints.txt").read_text().splitlines())
    conda = pins(pip)
    assert conda == {name: constraints[name] for name in conda}
    assert {"torch", "mlflow", "diffusers", "accelerate"} <= set(conda)


def test_every_dependency_is_in_the_constraints_and_is_a_range() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)
    assert block
    names = re.findall(r'"([A-Za-z0-9_-]+)>=', block.group(1))
    assert len(names) == len(block.group(1).strip().splitlines())
    constraints = pins((ROOT / "constraints.txt").read_text().splitlines())
    assert {name.lower() for name in names} <= set(constraints)


def test_the_ten_lines_of_the_readme_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    block = re.search(r"<!-- ten lines -->\n```python\n(.*?)```", README, re.S)
    assert block
    code = block.group(1)
    assert len([line for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]) <= 10
    monkeypatch.chdir(tmp_path)
    from mlflow_icr.tracking import read_history
    from tests.loop import my_loop

    scope = my_loop(steps=6)
    exec(compile(code, "README.md", "exec"), scope)
    rows = read_history(tmp_path / "outputs" / "mine")
    assert len(rows) >= 2
    assert all(0 < row["repr/icr"] < 2 for row in rows)


def test_links_and_pictures_of_the_documents_exist() -> None:
    made = {"modules.md", "own_loop.ipynb", "finished_run.ipynb", "gate.ipynb"}  # by docs/hooks.py, when the site is built
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", document.read_text()):
            if not target.startswith(("http://", "https://")) and target not in made:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_readmes_commands_are_make_targets() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([a-z]+)\b", README)) <= targets


def test_versions_agree() -> None:
    done = subprocess.run([sys.executable, "-m", "mlflow_icr.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == mlflow_icr.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == mlflow_icr.__version__


def test_ci_and_hooks_run_what_the_repository_runs() -> None:
    constraints = pins((ROOT / "constraints.txt").read_text().splitlines())
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["rev"] == f"v{constraints['ruff']}"
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    used = {target for step in steps for target in re.findall(r"make ([a-z]+)", step)}
    assert {"lint", "test", "docs", "wheel"} <= used <= targets
    versions = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert jobs["tests"]["strategy"]["matrix"]["python"] == versions

"""Hooks of MkDocs: pages that follow from the sources are made while the site is built, so they are never out of date."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("mlflow_icr", "trainers", "studies")


def purpose(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def modules_page() -> str:
    """Every package with its modules, each with the first paragraph of its docstring."""
    lines = [
        "# Modules",
        "",
        "This page is made from the docstrings. [How it is built](overview.md) says which package may use which.",
        "",
    ]
    for package in PACKAGES:
        for folder in sorted({path.parent for path in (ROOT / package).rglob("__init__.py")}):
            lines += [f"## `{folder.relative_to(ROOT).as_posix()}/`", "", purpose(folder / "__init__.py"), ""]
            modules = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("__")]
            if modules:
                lines += ["| module | purpose |", "|---|---|"]
                lines += [f"| `{path.stem}` | {purpose(path)} |" for path in modules]
                lines.append("")
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Add the page of modules, and the tutorials as notebooks, to the site."""
    import jupytext
    from mkdocs.structure.files import File

    files.append(File.generated(config, "built/modules.md", content=modules_page()))
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.py")):
        notebook = jupytext.writes(jupytext.read(path, fmt="py:percent"), fmt="ipynb")
        files.append(File.generated(config, f"tutorials/{path.stem}.ipynb", content=notebook))
    return files

"""Hooks of MkDocs: pages that follow from the sources are made while the site is built, so they are never out of date."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the site is that of these sources, whatever is installed
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


def run_here(command: str) -> str:
    """The output of a command of `mlflow-icr`, run in this process."""
    from mlflow_icr import cli

    program, *arguments = shlex.split(command)
    assert program == "mlflow-icr", f"{command}: expected a command of mlflow-icr"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), contextlib.suppress(SystemExit):
        cli.main(arguments)
    return printed.getvalue().rstrip()


def commands_page() -> str:
    """The output of `--help` for every command, and for a training."""
    from mlflow_icr.cli import COMMANDS
    from trainers.command_line import train_parser

    os.environ["COLUMNS"] = "110"
    names = argparse.ArgumentParser().add_subparsers()
    for command in COMMANDS:
        command.add(names)
    lines = ["# Commands", "", "This page shows what `--help` prints.", ""]
    for name in names.choices:
        lines += [f"## mlflow-icr {name}", "", "```text", run_here(f"mlflow-icr {name} --help"), "```", ""]
    return "\n".join([*lines, "## trainers.train", "", "```text", train_parser().format_help().rstrip(), "```", ""])


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each `<!-- prints: COMMAND -->` by the command's output."""

    def session(match: re.Match[str]) -> str:
        return f"```text\n$ {match[1]}\n{run_here(match[1])}\n```"

    return re.sub(r"<!-- prints: (.*?) -->", session, markdown)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of modules and commands, and the tutorials as notebooks, to the site."""
    import jupytext
    from mkdocs.structure.files import File

    files.append(File.generated(config, "built/modules.md", content=modules_page()))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.py")):
        notebook = jupytext.writes(jupytext.read(path, fmt="py:percent"), fmt="ipynb")
        files.append(File.generated(config, f"tutorials/{path.stem}.ipynb", content=notebook))
    return files

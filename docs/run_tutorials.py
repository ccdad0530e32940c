"""Run the tutorials, and write a page with what each cell printed and drew: `python docs/run_tutorials.py [NAME ...]`.

Each tutorial runs in a process and a folder of its own. Its page is `docs/tutorials/NAME.md`, its figures are in
`docs/images/tutorials/`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jupytext

DOCS = Path(__file__).resolve().parent
TUTORIALS = DOCS / "tutorials"
FIGURES = DOCS / "images" / "tutorials"


def cells(path: Path) -> list[tuple[str, str]]:
    """Kind ("markdown" or "code") and source of each cell of a py:percent file."""
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path, fmt="py:percent").cells]


def execute(path: Path, results: Path) -> None:
    """Run a tutorial's cells here, one after the other; their output goes to `results`/printed.json, figures beside it."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, (kind, source) in enumerate(cells(path)):
        output = io.StringIO()
        if kind == "code":
            with contextlib.redirect_stdout(output):
                exec(compile(source, f"{path.name}, cell {number}", "exec"), names)
            for figure in plt.get_fignums():
                plt.figure(figure).savefig(results / f"{path.stem}-{number}.png", dpi=110)
            plt.close("all")
        printed.append(output.getvalue().rstrip())
    (results / "printed.json").write_text(json.dumps(printed))


def page(path: Path, printed: list[str]) -> str:
    """A tutorial as Markdown: its cells, with what they printed and drew."""
    title, *parts = cells(path)[0][1].split("\n", 1)
    parts = [title, f"[Download this page as a notebook]({path.stem}.ipynb).", *(part.strip() for part in parts)]
    for number, (kind, source) in enumerate(cells(path)[1:], 1):
        parts.append(source if kind == "markdown" else f"```python\n{source}\n```")
        if printed[number]:
            parts.append(f"```text\n{printed[number]}\n```")
        if (FIGURES / f"{path.stem}-{number}.png").exists():
            parts.append(f"![What the cell above draws](../images/tutorials/{path.stem}-{number}.png)")
    return "\n\n".join(parts) + "\n"


def write_page(path: Path) -> None:
    """Run a tutorial in a fresh process and folder, and write its page and figures."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as results:
        command = [sys.executable, __file__, "--execute", str(path), results]
        environment = os.environ | {"PYTHONPATH": str(DOCS.parent), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        subprocess.run(command, cwd=folder, check=True, env=environment)
        FIGURES.mkdir(exist_ok=True)
        for old in FIGURES.glob(f"{path.stem}-*.png"):
            old.unlink()
        for figure in Path(results).glob("*.png"):
            shutil.copy(figure, FIGURES)
        path.with_suffix(".md").write_text(page(path, json.loads((Path(results) / "printed.json").read_text())))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--execute"]:
        execute(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        for name in sys.argv[1:] or sorted(path.stem for path in TUTORIALS.glob("*.py")):
            write_page(TUTORIALS / f"{name}.py")

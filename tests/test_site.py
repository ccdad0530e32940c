"""The site: no warning when it is built, short sentences, every metric described; its first steps run as they are written."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_icr.monitoring.catalogue import catalogue, catalogue_page, metric_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FIRST_PAGES = ("../README.md", "index.md", "five-minutes.md", "reading.md", "your-loop.md")
MOST_WORDS = 30


def prose(markdown: str) -> str:
    """A page without code, tables, comments, pictures and the addresses of its links."""
    text = re.sub(r"```.*?```", ".", markdown, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"^(#|\|).*$", ".", text, flags=re.M)
    text = re.sub(r"!\[[^]]*]\([^)]*\)", "", text)
    return re.sub(r"]\([^)]*\)", "]", text)


def sentences(markdown: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"[.?!:;](?:\s|$)|\n\n|\n- |\n\d\. ", prose(markdown)) if part.strip()]


@pytest.mark.parametrize("page", FIRST_PAGES)
def test_sentences_are_short(page: str) -> None:
    found = sentences((DOCS / page).read_text())
    assert len(found) > 5, "no sentences were found: the page cannot be judged"
    long = [text for text in found if len(text.split()) > MOST_WORDS]
    assert not long, long


def test_a_long_sentence_is_seen() -> None:
    page = "Short one.\n\n" + "word " * 31 + ".\n\n| " + "cell " * 40 + "|\n"
    assert max(len(text.split()) for text in sentences(page)) == 31


def test_keys_find_their_own_entry() -> None:
    for key, stem in (
        ("repr/icr", "repr/icr"),
        ("repr_raw_sigma0.1/icr_rise_low", "repr/icr_rise"),
        ("gen/fd_gap_efficientnet_lite0", "gen/fd_gap_<encoder>"),
        ("gen/fd_pixels", "gen/fd_<encoder>"),
        ("mem/copies_sscd_train", "mem/copies_<encoder>"),
    ):
        found = metric_of(key)
        assert found is not None, key
        assert found.key == stem
    assert metric_of("optimizer/lr") is None
    assert len({metric.key for metric in catalogue()}) == len(catalogue())


def test_the_page_of_metrics_is_the_catalogue() -> None:
    assert (DOCS / "metrics.md").read_text() == catalogue_page(), "python docs/build_pages.py writes it anew"


def test_the_gallery_is_of_kept_histories() -> None:
    """Its texts are what the histories say, each state is shown, and its pictures are small."""
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["gallery"] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    page = (DOCS / "reading.md").read_text()
    assert made.with_gallery(page) == page, "python docs/gallery.py writes it anew"
    ends = [made.states_of(made.shown_of(case))[-1] for case in made.CASES]
    assert set(ends) == set(made.COLOURS)
    for case in made.CASES:
        assert 5_000 < (DOCS / "images" / f"reading-{case.name}.svg").stat().st_size < 60_000


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env={"PATH": "", "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    assert {
        "index.html",
        "five-minutes.html",
        "metrics.html",
        "api/measure.html",
        "built/modules.html",
        "commands.html",
    } <= pages
    questions = (tmp_path / "site" / "faq.html").read_text()
    assert "did you mean checkpoints?" in questions, "the command in the page was not run"
    assert "--images-per-step N" in (tmp_path / "site" / "commands.html").read_text()
    text = (tmp_path / "site" / "api" / "measure.html").read_text()
    assert "Measures the Invariant Contamination Ratio" in text, "the API pages lack the docstrings"
    outside = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', text)
    assert not outside, "a page asks another server for a file"


def commands(page: str) -> list[tuple[str, str]]:
    """The blocks of a page that are marked to be run: their mark and their text."""
    return re.findall(r"<!-- run(?:: (\w+))? -->\n```\n(.*?)```", (DOCS / page).read_text(), re.S)


@pytest.mark.slow
def test_the_first_five_minutes_as_they_are_written(tmp_path: Path) -> None:
    blocks = commands("five-minutes.md")
    assert [mark for mark, _ in blocks] == ["install", "", "", "", ""]
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    bin_folder, work = tmp_path / "venv" / "bin", tmp_path / "work"
    work.mkdir()
    environment = {"PATH": f"{bin_folder}:/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "2"}
    environment["PIP_CONSTRAINT"] = str(ROOT / "constraints.txt")
    for mark, text in blocks:
        done = subprocess.run(
            ["bash", "-ec", text], cwd=ROOT if mark == "install" else work, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 or "doctor" in text, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    rows = [json.loads(line) for line in (work / "outputs" / "first" / "history.jsonl").read_text().splitlines()]
    assert len(rows) == 1 + 9  # before the first step, and nine times after
    assert "<html" in (work / "first.html").read_text()
    assert "<html" in (work / "outputs" / "first" / "report" / "index.html").read_text()

"""Plain words: no docstring, comment, message or page has a word that readers stumbled over, and names say what they hold."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What to write in place of it, by pattern.
BETTER = {
    r"whoever|somebody|nobody|anybody": "who it is: the caller, a process, the trainer; or the passive",
    r"unasked|unsaid": "by default; silently",
    r"anew": "again",
    r"(go|goes|going|gone) on (with|where|there)": "continue, resume",
    r"hears? of|hear a line|hears a line": "gets a line, is called with",
    r"what (becomes|became) of": "the outcome of",
    r"(what|that) cannot be(?= *[.,;:)\"])": "impossible, invalid",
    r"fates?": "they end together",
    r"(this|the|of) rooms?": "package",
    r"of old|as ever": "as before",
    r"but for": "except",
    r"likewise": "the same way",
    r"(is|are|was|were) told of": "is logged, is reported",
    r"couriers?|porters?|outgrown": "what it does",
    r"all is in|all there is of": "all results are in",
}
PATTERNS = {
    re.compile(rf"\b(?:{words})\b" if words[-1] not in "$)" else rf"\b(?:{words})", re.I): better
    for words, better in BETTER.items()
}
NAMES = {"says", "mine", "told", "some", "lay_out", "outgrown", "courier", "porter"}
PACKAGES = ("mlflow_icr", "trainers", "studies")
PAGES = ["README.md", "CONTRIBUTING.md", *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@cache
def texts() -> list[tuple[str, str]]:
    """Where, and what is said there: each comment and text of a module, each page."""
    found = []
    for path in modules():
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type in (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1)):
                found.append((f"{path.relative_to(ROOT)}:{token.start[0]}", " ".join(token.string.split())))
    found += [(page, " ".join((ROOT / page).read_text().split())) for page in PAGES]
    return found


def hits(text: str) -> Iterator[str]:
    for pattern, better in PATTERNS.items():
        for match in pattern.finditer(text):
            around = text[max(0, match.start() - 40) : match.end() + 30]
            yield f"{match[0]!r} in '...{around}...'; better: {better}"


def test_no_text_has_a_word_that_readers_stumble_over() -> None:
    found = [f"{where}: {hit}" for where, text in texts() for hit in hits(text)]
    assert not found, "\n".join(found)


def test_such_words_are_seen() -> None:
    assert len(list(hits("Nobody hears of what cannot be, and it goes on where it was."))) == 4
    assert not list(hits("What cannot be read is left out; the run goes on."))


@pytest.mark.parametrize("package", PACKAGES)
def test_names_say_what_they_hold(package: str) -> None:
    found = []
    for path in modules():
        if path.relative_to(ROOT).parts[0] != package:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.FunctionDef(name=name):
                    if name.strip("_").lower() in NAMES:
                        found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not found, "\n".join(found)

"""`--help`: every command and every flag is explained, and each command shows an example; pages name only flags that exist."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlflow_icr import cli
from mlflow_icr.integrations import diffusers as diffusers_script
from trainers.command_line import train_parser
from trainers.experiments import demo, split_halves
from trainers.experiments.paper import command as paper
from trainers.experiments.sweep import plan as sweep

ROOT = Path(__file__).parents[1]
# Their command lines, by module.
PROGRAMS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "mlflow_icr.cli": cli._parser,
    "mlflow_icr.integrations.diffusers": diffusers_script._parser,
    "trainers.train": train_parser,
    "trainers.experiments.demo": demo._parser,
    "trainers.experiments.paper": paper._parser,
    "trainers.experiments.split_halves": split_halves._parser,
    "trainers.experiments.sweep": sweep._parser,
}


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command of `mlflow-icr`, by name."""
    [actions] = [action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert {choice.dest for choice in actions._choices_actions} == set(actions.choices), "a command without a line in the list"
    return dict(actions.choices)


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield from ((name, make()) for name, make in PROGRAMS.items())
    yield from ((f"mlflow-icr {name}", parser) for name, parser in commands().items())


@pytest.mark.parametrize(("name", "parser"), list(parsers()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_flag_is_explained_and_there_is_an_example(name: str, parser: argparse.ArgumentParser) -> None:
    bare = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS and action.dest == "arguments":  # what is handed on to a script
            continue
        words = (action.help or "").split()
        if len(words) < 2 and not isinstance(action, argparse._SubParsersAction):
            bare.append(action.option_strings or action.dest)
    assert not bare, f"{name}: no help for {bare}"
    assert parser.description, name
    assert re.search(r"examples?:\n  (mlflow-icr|python -m) ", parser.epilog or ""), f"{name} shows no example"
    text = parser.format_help()
    assert "==SUPPRESS==" not in text


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return {option for option in parser._option_string_actions if option.startswith("--")}


def mentioned() -> Iterator[tuple[str, str, list[str]]]:
    """Page, program or command, and flags of each command line in the pages and in the examples of `--help`."""
    texts = {
        path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    }
    texts |= {f"{name} --help": parser.epilog or "" for name, parser in parsers()}
    for page, text in texts.items():
        shown = re.sub(r"<!-- prints: .*? -->", "", text)  # those may show an error
        for line in re.sub(r"\\\n\s*", " ", shown).splitlines():
            for program, rest in re.findall(r"(?:^|[`| ])(mlflow-icr [a-z-]+|python -m [a-z_.]+)((?: [^`|#\n]*)?)", line):
                known = re.findall(r"(?:^|[\s\[])(--[a-z0-9-]+)", rest)
                yield page, program.removeprefix("python -m "), known


def test_pages_name_only_commands_and_flags_that_exist() -> None:
    known = {f"mlflow-icr {name}": flags(parser) for name, parser in commands().items()}
    known |= {name: flags(make()) for name, make in PROGRAMS.items()}
    known["trainers.experiments.noise_window"] = known["trainers.experiments.demo"] | {"--study-dir"}
    seen = 0
    for page, program, given in mentioned():
        if program.startswith("mlflow-icr ") and program not in known and shlex.split(program)[1] not in ("and",):
            raise AssertionError(f"{page}: {program} is no command")
        if program == "mlflow_icr.integrations.diffusers":  # the script's own flags follow
            given = given[:1]
        for flag in given if program in known else ():
            assert flag in known[program], f"{page}: {program} has no {flag}"
            seen += 1
    assert seen > 40


def test_a_run_that_is_not_there_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("verdict", "summary", "rank-images"):
        assert cli.main([command, "outputs/nothing"]) == 2
        line = capsys.readouterr().err
        expected = "folder is 'outputs/nothing', which holds no history.jsonl; expected the output folder of a run"
        assert line == f"mlflow-icr: error: {expected}\n"

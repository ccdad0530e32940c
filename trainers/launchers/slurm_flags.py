"""Flags for the resources of a Slurm job."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from trainers.launchers.slurm import SlurmOptions, minutes

WHOLE = {
    "nodes": "number of nodes of each run",
    "gpus_per_node": "number of GPUs on each node; each has a process",
    "tasks_per_node": "number of processes on each node; default: one for each GPU, or one",
    "cpus_per_task": "number of cores of each process",
    "stop_seconds": "seconds between the signal to stop and the end of a job; default: 120",
    "most_timeouts": "how often a run that reaches its time limit is requeued; default: 100",
}
TEXTS = {
    "time": "time limit of a job, in minutes, as H:MM:SS or D-HH:MM:SS; a longer run is requeued; default: 60",
    "mem": "memory of each node, such as 32GB",
    "partition": "partition, as for sbatch",
    "account": "account, as for sbatch",
    "qos": "quality of service, as for sbatch",
    "constraint": "constraint, as for sbatch",
    "slurm_options": "other options of sbatch, such as reservation=NAME;exclusive=",
}


def add_slurm_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each option of a job, taken as text."""
    group = parser.add_argument_group("slurm", "Resources of each job, with --launcher=slurm.")
    for name, text in (WHOLE | TEXTS).items():
        group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, metavar="X", help=text)


def slurm_options(arguments: Mapping[str, Any], launcher: str) -> SlurmOptions:
    """The options that were given. Raises ValueError for impossible values, and for any value if the launcher takes none."""
    given = {name: arguments[name] for name in WHOLE | TEXTS if name in arguments}
    if launcher != "slurm" and given:
        name = next(iter(given))
        raise ValueError(
            f"{name} is {given[name]!r}, which is for Slurm, but launcher is {launcher!r}; expected launcher 'slurm'"
        )
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name in WHOLE:
            if not text.isdigit():
                raise ValueError(f"{name} is {text!r}; expected a whole number")
            values[name] = int(text)
        elif name == "time":
            values["time_minutes"] = minutes(text)
        elif name == "slurm_options":
            values["others"] = _others(text)
        else:
            values[name] = text
    return SlurmOptions(**values)


def _others(text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, value = part.partition("=")
        if not (name and equals):
            raise ValueError(f"slurm_options is {text!r}; expected NAME=VALUE, or NAME= for a switch, separated by semicolons")
        options[name.strip().lstrip("-")] = value.strip() or True
    return options

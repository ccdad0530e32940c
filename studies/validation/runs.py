"""The runs of the plan, and a worker pool that trains those whose results are missing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from studies.validation.design import PLAN
from studies.validation.results import result_path
from trainers.config import TrainConfig, load_config

RESULTS = Path(__file__).parents[2] / "docs" / "validation" / "results"
BASE = "mnist5k"  # the preset whose values hold where the plan says nothing
CIFAR10 = "uoft-cs/cifar10"  # where the plan's `cifar10` comes from, unless a folder or an archive of it is given
CIFAR10_VARIABLE = "VALIDATION_CIFAR10"
# All label-free companions, for each may be a rival.
COMPANIONS = (
    "alignment", "uniformity", "rankme", "effective_rank", "lidar", "feature_deviation", "stable_rank", "sima",
)  # fmt: skip


@dataclass(frozen=True)
class PlannedRun:
    """A run of the plan: its factors, the trainer's options, which features it needs, and what happens before or midway.

    `before` are options of a training whose network the run begins with; `changes` are options that change at `at_kimg`.
    """

    name: str
    chosen_on: bool
    needs: tuple[str, ...]
    factors: Mapping[str, Any]
    options: Mapping[str, Any]
    before: Mapping[str, Any] | None = None
    changes: tuple[Mapping[str, Any], ...] = field(default=())


@dataclass(frozen=True)
class Plan:
    """The plan's runs in order, and what was fixed before the first of them."""

    runs: tuple[PlannedRun, ...]
    monitor: Mapping[str, Any]
    truth: Mapping[str, Mapping[str, Any]]
    open_factor: float
    horizons_epochs: tuple[int, ...]


def read_plan(path: Path = PLAN) -> Plan:
    """The plan of a file."""
    values = json.loads(path.read_text())
    runs = [
        PlannedRun(**run | {"needs": tuple(run["needs"]), "changes": tuple(run.get("changes", ()))}) for run in values["runs"]
    ]
    return Plan(tuple(runs), values["monitor"], values["truth"], values["open_factor"], tuple(values["horizons_epochs"]))


def config_of(options: Mapping[str, Any], plan: Plan, **others: Any) -> TrainConfig:
    """The trainer's configuration. Raises ValueError for an option that the trainer does not have."""
    values = {
        **plan.monitor,
        "companions": COMPANIONS,
        "generate_every": "1",
        "checkpoints_total_limit": 0,
        "log_models": "none",
    }
    values |= {**options, **others}
    if values["data"] == "cifar10":
        values["data"] = os.environ.get(CIFAR10_VARIABLE, CIFAR10)
    return load_config(BASE, {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def missing_feature(run: PlannedRun, plan: Plan) -> str | None:
    """Why the trainer cannot train a run yet, or None."""
    try:
        config_of(run.options, plan)
        if run.before is not None:
            config_of(run.options, plan, init_from="")
    except ValueError as error:
        return str(error)
    return None


def _in_child(arguments: list[str], log: Path) -> None:
    """A run in a forked process, whose output goes to a file."""
    from studies.validation.training import main

    with log.open("ab", buffering=0) as out:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(out.fileno(), stream.fileno())
    sys.exit(main(arguments))


def _train(run: PlannedRun, work: Path, results: Path, children: list[BaseProcess]) -> str | None:
    """Train one run, or continue it, in a process of its own; returns what went wrong."""
    log = work / f"{run.name}.log"
    # Forked from a process that has imported torch and diffusers once: that takes as long as a tenth of a training.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["studies.validation.training"])
    child = context.Process(target=_in_child, args=([run.name, f"--work-dir={work}", f"--results-dir={results}"], log))
    child.start()
    children.append(child)
    child.join()
    if child.exitcode == 0:
        return None
    last = log.read_text().strip().splitlines()[-1:]
    return f"{run.name}: exit status {child.exitcode} ({''.join(last)}); all of it is in {log}"


def train_missing(plan: Plan, work: Path, results: Path, parallel: int) -> list[str]:
    """Train the runs that have no results yet, in the plan's order, `parallel` at a time; returns a line for each failure.

    One thread each, unless OMP_NUM_THREADS says otherwise. SIGTERM or SIGINT ends the trainings that go on, which save, and no
    other is begun.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    work.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    there = {run.name for run in plan.runs if result_path(results, run.name).exists()}
    missing = [run for run in plan.runs if run.name not in there]
    untrainable = {run.name: why for run in missing if (why := missing_feature(run, plan))}
    children: list[BaseProcess] = []
    stopped, printing, count = threading.Event(), threading.Lock(), len(there)

    def stop(number: int, frame: object) -> None:
        stopped.set()
        for child in children:
            child.terminate()

    def one(run: PlannedRun) -> str | None:
        nonlocal count
        if stopped.is_set():
            return f"{run.name}: not begun"
        failure = untrainable.get(run.name) or _train(run, work, results, children)
        with printing:
            count += failure is None
            print(failure or f"{count}/{len(plan.runs)} {run.name}", flush=True)
        return failure

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with ThreadPoolExecutor(parallel) as pool:
            return [failure for failure in pool.map(one, missing) if failure]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def select(plan: Plan, names: Sequence[str]) -> Plan:
    """The plan with some of its runs alone. Raises ValueError for a name that it does not have."""
    by_name = {run.name: run for run in plan.runs}
    for name in names:
        if name not in by_name:
            raise ValueError(f"run is {name!r}; expected one of the {len(by_name)} in {PLAN.name}")
    return Plan(tuple(by_name[name] for name in names), plan.monitor, plan.truth, plan.open_factor, plan.horizons_epochs)

"""The runs of the plan, and their training where results are missing."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studies.validation.design import PLAN
from studies.validation.results import result_path
from trainers.config import TrainConfig, load_config
from trainers.launchers.job import FINISHED, Job
from trainers.launchers.local import LocalLauncher

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


def _job(run: PlannedRun, work: Path, results: Path) -> Job:
    """The job of a run, or of the rest of it: it resumes by itself where it can."""
    command = (sys.executable, "-m", "studies.validation.training", run.name)
    where = (f"--work-dir={work}", f"--results-dir={results}")
    return Job(run.name, command + where, begun=None, log=work / f"{run.name}.log")


def train_missing(plan: Plan, work: Path, results: Path, parallel: int) -> list[str]:
    """Train the runs that have no results yet, in the plan's order, `parallel` at a time; returns a line for each failure.

    One thread each, unless OMP_NUM_THREADS says otherwise, which they share. SIGTERM or SIGINT ends the running trainings,
    which save, and no other one begins.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    work.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    trained = {run.name for run in plan.runs if result_path(results, run.name).exists()}
    missing = [run for run in plan.runs if run.name not in trained]
    untrainable = {run.name: why for run in missing if (why := missing_feature(run, plan))}
    for why in untrainable.values():
        print(why, flush=True)
    jobs = [_job(run, work, results) for run in missing if run.name not in untrainable]
    failures, not_ended, count = list(untrainable.values()), [job.name for job in jobs], len(trained)
    stopped = threading.Event()
    handlers = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for ended in LocalLauncher(parallel).run(jobs, stopped.is_set, lambda _: None):
            not_ended.remove(ended.name)
            if ended.status == FINISHED:
                count += 1
                print(f"{count}/{len(plan.runs)} {ended.name}", flush=True)
            else:
                failures.append(f"{ended.name}: {ended.why or 'stopped'}; all of it is in {work / ended.name}.log")
                print(failures[-1], flush=True)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return failures + [f"{name}: not begun" for name in not_ended]


def select(plan: Plan, names: Sequence[str]) -> Plan:
    """The plan with some of its runs alone. Raises ValueError for a name that it does not have."""
    by_name = {run.name: run for run in plan.runs}
    for name in names:
        if name not in by_name:
            raise ValueError(f"run is {name!r}; expected one of the {len(by_name)} in {PLAN.name}")
    return Plan(tuple(by_name[name] for name in names), plan.monitor, plan.truth, plan.open_factor, plan.horizons_epochs)

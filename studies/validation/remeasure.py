"""Measure finished runs again, from the checkpoints that are still where they were trained.

`python -m studies.validation.remeasure --work-dir DIR --results-dir DIR` reads every `repr/*` value again with the monitor as
it is now. Samples and losses stay as they were measured: they are the same.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from mlflow_icr.arguments import OneLineParser
from mlflow_icr.tracking.checkpoints.folder import checkpoints
from studies.validation.results import Result, by_name, read_results, write_result
from studies.validation.runs import Plan, PlannedRun, config_of, read_plan
from studies.validation.training import KEPT_PARAMS
from trainers.run import Run

WEIGHTS = "diffusion_pytorch_model.safetensors"
READ_ANEW = ("repr/", "repr_")


def load_weights(network: nn.Module, path: Path) -> None:
    """Put the weights of a file into a network. Raises ValueError for those of another one."""
    try:
        network.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold this network ({str(error).splitlines()[0]})") from None


def began_with(run: PlannedRun, folder: Path) -> dict[str, str]:
    """The option of the network that a run began with, if it began with one. Raises ValueError where that is gone."""
    if run.before is None:
        return {}
    before = folder.with_name(f"{folder.name}.before")
    saved = checkpoints(before)
    if not saved:
        raise ValueError(f"{before} has no checkpoint, with which {run.name} began")
    return {"init_from": str(saved[max(saved)])}


def measured_anew(run: PlannedRun, plan: Plan, folder: Path, result: Result) -> Result:
    """A run's result, with each checkpoint measured by the present monitor. Raises ValueError where one is missing."""
    present_run, saved = Run(config_of(run.options, plan, **began_with(run, folder)), folder), checkpoints(folder)
    present_run.monitor.pictures = present_run.generation.pictures = False
    rows = []
    for row in result.rows:
        step = int(row["images_seen"])
        if step not in saved:
            raise ValueError(f"{folder} has no checkpoint at {step} images seen")
        (weights,) = saved[step].glob(f"*/{WEIGHTS}")
        load_weights(present_run.state.ema, weights)
        kept = {key: value for key, value in row.items() if not key.startswith(READ_ANEW)}
        rows.append({**kept, **present_run.monitor.measure(step).values})
    params = present_run.params()
    return replace(result, params={key: params[key] for key in KEPT_PARAMS if key in params}, rows=rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 where a run could not be measured."""
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(message)s")
    parser = OneLineParser(prog="validation.remeasure", description=__doc__, allow_abbrev=False)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--results-dir", type=Path, required=True)
    parser.add_argument("--lacking", metavar="KEY", help="only results none of whose rows has this key")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="measure this run alone; repeatable")
    arguments = parser.parse_args(argv)
    plan, results, failed = read_plan(), by_name(read_results(arguments.results_dir)), 0
    for run in plan.runs:
        result = results.get(run.name)
        if result is None or (arguments.only and run.name not in arguments.only):
            continue
        if arguments.lacking and any(arguments.lacking in row for row in result.rows):
            continue
        try:
            write_result(arguments.results_dir, measured_anew(run, plan, arguments.work_dir / run.name, result))
            print(run.name, flush=True)
        except (ValueError, OSError) as error:
            print(f"{run.name}: {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

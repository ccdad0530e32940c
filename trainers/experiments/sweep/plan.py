"""A sweep from its command line: the runs, their folder, the states in which earlier commands left them, and the launcher."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow_icr.arguments import OneLineParser
from mlflow_icr.tracking.event_log import ended_as
from trainers.checkpoint import latest_checkpoint
from trainers.command_line import config_flags
from trainers.config import OPTIONS, TrainConfig, config_from, preset_names, read_values
from trainers.experiments.sweep.grid import GridPoint, check_data, expand, grid_fields
from trainers.launchers.job import FAILED, FINISHED, Job
from trainers.launchers.slurm import SlurmOptions, check_cluster
from trainers.launchers.slurm_flags import add_slurm_flags, slurm_options
from trainers.train import CONFIG, check_project

AUTO = "auto"
LAUNCHERS = ("local", "slurm")
STUDY = "study.json"  # holds the study's name, for later commands
LOCK = ".lock"


@dataclass(frozen=True)
class Sweep:
    """The runs, the study that they belong to and its folder, and how they are launched."""

    name: str
    folder: Path
    runs: Sequence[GridPoint]
    finished: frozenset[str]  # names of the runs that earlier commands have finished
    states: Mapping[str, str]  # the state of each run before this command, in words
    launcher: str
    parallel: int
    slurm: SlurmOptions
    params: Mapping[str, str]  # of the study's MLflow run
    dry_run: bool

    def folder_of(self, run: GridPoint) -> Path:
        """A run's output folder."""
        return self.folder / "runs" / run.name

    def job(self, run: GridPoint) -> Job:
        """The job that launches a run."""
        tags = (f"study={self.name}", "role=run")
        command = (
            sys.executable, "-m", "trainers.train", *config_flags(run.config), f"--output-dir={self.folder_of(run)}",
            f"--run-name={run.name}", *(f"--tag={tag}" for tag in tags),
        )  # fmt: skip
        return Job(run.name, command, self.folder_of(run) / CONFIG, self.folder / "logs" / f"{run.name}.log")


EXAMPLE = """example:
  python -m trainers.experiments.sweep --num-images 64,128,256 --seeds 0:5 --batch-size 16,32"""


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"dry_run is {text!r}; expected true or false")
    return text.lower() == "true"


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="sweep",
        description="Train for several sizes, seeds or other values, and show when each run turns and copies. "
        "Any flag of trainers.train takes several values.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset",
        default="digits",
        metavar="NAME,...",
        help=f"one or more presets: {', '.join(preset_names())}; default: digits",
    )
    parser.add_argument("--seeds", default=argparse.SUPPRESS, metavar="X,Y,...", help="seeds of the runs; the same as --seed")
    parser.add_argument(
        "--output-dir",
        default=AUTO,
        metavar="DIR",
        help="folder of the study; default: outputs/sweep-..., the same for the same flags",
    )
    parser.add_argument(
        "--launcher", default="local", metavar="NAME", help=f"how runs are started: {' or '.join(LAUNCHERS)}; default: local"
    )
    parser.add_argument("--max-parallel", default="2", metavar="N", help="runs at the same time; default: 2")
    parser.add_argument(
        "--dry-run",
        type=_truth,
        nargs="?",
        const=True,
        default=False,
        metavar="true|false",
        help="print what would be run, and end",
    )
    group = parser.add_argument_group(
        "configuration", "Several values are separated by commas (0:5 is 0,1,2,3,4), or by semicolons where a value has commas."
    )
    for field in grid_fields():
        group.add_argument(
            f"--{field.replace('_', '-')}",
            default=argparse.SUPPRESS,
            metavar="X,Y,...",
            nargs="?",
            const="true",
            help=OPTIONS[field].rules["text"].replace("%", "%%"),
        )
    add_slurm_flags(parser)
    return parser


def _texts(arguments: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The values of each field as text, sizes first and seeds last, and what fields were given as."""
    if "seed" in arguments and "seeds" in arguments:
        raise ValueError(f"seed is {arguments['seed']!r} and seeds {arguments['seeds']!r}; expected one of them")
    texts = {field: arguments[field] for field in grid_fields() if field in arguments}
    shown = {}
    if "seeds" in arguments:
        texts["seed"], shown["seed"] = arguments["seeds"], "seeds"
    order = sorted(texts, key=lambda field: (field != "num_images", field == "seed"))
    return {field: texts[field] for field in order}, shown


def _same_probe(runs: Sequence[GridPoint]) -> list[GridPoint]:
    """Runs measured on as many images as the smallest has: subsets of a seed nest, so its runs share the measured images."""
    probe = min(min(run.config.monitor.probe_images, run.config.data.num_images) for run in runs)
    return [replace(run, config=run.config.changed(probe_images=probe)) for run in runs]


def _folder(output_dir: str, configs: Sequence[TrainConfig]) -> Path:
    if output_dir != AUTO:
        return Path(output_dir)
    # The same command finds its folder again, and continues there.
    content = json.dumps([config.flat() for config in configs], sort_keys=True)
    presets = "-".join(dict.fromkeys(config.preset for config in configs))
    return Path("outputs") / f"sweep-{presets}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def _study_name(folder: Path, configs: Sequence[TrainConfig]) -> str:
    """The study's name: that of the folder's study, else a new one, which no other store or clone has. Raises ValueError."""
    if (folder / STUDY).exists():
        return str(json.loads((folder / STUDY).read_text())["study"])
    if folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise ValueError(
            f"output_dir is {str(folder)!r}, which holds something else; expected a new folder, or that of a sweep"
        )
    return f"{time.strftime('%Y%m%d-%H%M%S')}-sweep-{'-'.join(dict.fromkeys(config.preset for config in configs))}"


def _state(run: GridPoint, folder: Path) -> str:
    """The state in which an earlier command left a run, in words. Raises ValueError if it had another configuration."""
    if not (folder / CONFIG).exists():
        return "new"
    saved = config_from(read_values(folder / CONFIG)).flat()
    for key, value in run.config.flat().items():
        if saved[key] != value and value is not None:  # the number of measured images is not known in advance
            raise ValueError(
                f"{key} is {value!r}, but {folder} has a run with {saved[key]!r}; expected the same, or a new output_dir"
            )
    ended = ended_as(folder)
    if ended == FINISHED:
        return "finished"
    checkpoint = latest_checkpoint(folder)
    since = "from the start" if checkpoint is None else f"from {int(checkpoint.name):,} images seen on"
    return f"failed, and is tried again {since}" if ended == FAILED else f"goes on {since}"


def plan(argv: Sequence[str] | None) -> Sweep:
    """The sweep that a command line asks for. Raises ValueError for impossible values, before anything runs or is written."""
    arguments = vars(_parser().parse_args(argv))
    launcher, parallel = arguments["launcher"], arguments["max_parallel"]
    if launcher not in LAUNCHERS:
        raise ValueError(f"launcher is {launcher!r}; expected one of {', '.join(LAUNCHERS)}")
    if not parallel.isdigit() or int(parallel) < 1:
        raise ValueError(f"max_parallel is {parallel!r}; expected a whole number >= 1")
    slurm = slurm_options(arguments, launcher)
    texts, shown = _texts(arguments)
    runs = expand(arguments["preset"], texts, shown)
    runs = runs if "probe_images" in texts else _same_probe(runs)
    for run in runs:
        run.config.check_ranks(slurm.ranks)
    check_data(runs)
    if launcher == "slurm":
        check_cluster()
    configs = [run.config for run in runs]
    folder = _folder(arguments["output_dir"], configs)
    name = _study_name(folder, configs)
    states = {run.name: _state(run, folder / "runs" / run.name) for run in runs}
    finished = frozenset(name for name, state in states.items() if state == "finished")
    check_project()
    params = {"preset": arguments["preset"], **{shown.get(field, field): text for field, text in texts.items()}}
    params["launcher"] = launcher
    return Sweep(name, folder, runs, finished, states, launcher, int(parallel), slurm, params, arguments["dry_run"])

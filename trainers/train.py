"""One training run: `python -m trainers.train --preset digits --output-dir DIR`, also under torchrun and accelerate launch."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import yaml

import mlflow_icr
from mlflow_icr.arguments import refuse_unknown
from mlflow_icr.integrations.ending import end_as_rank
from mlflow_icr.monitoring.series import HISTORY, read_history
from mlflow_icr.tracking.checkpoints.folder import check_register
from trainers.command_line import config_changes, parse_tags, train_parser
from trainers.config import OPTIONS, TrainConfig, config_from, preset_names, preset_values, read_values, with_changes
from trainers.launch import check_launcher, check_processes, is_launched, launch
from trainers.launchers.job import stop_signals
from trainers.places import check_apart, output_folder, settled_paths
from trainers.plan import plan_for

if TYPE_CHECKING:
    from trainers.run import Run

CONFIG = "config.yaml"
RESUME = ("no", "yes", "auto")
CHANGES = "config_changes.jsonl"  # one line for each resumption with another configuration
# Options that a resumed run may change, and whose changes are written down; any other change would make it another training.
MAY_CHANGE = frozenset(
    (
        "total_kimg",
        "learning_rate",
        "data",  # the same images in another place, by their hash
        "batch_size",  # a new origin of its clock: train/origin_images_seen
        "gradient_accumulation_steps",
        "lr_decay",
        "lr_decay_kimg",
        "clip_norm",
        # How it is computed:
        "mixed_precision",
        "gradient_checkpointing",
        "compile",
        "cudnn_benchmark",
        "measure_batch",
        "sample_batch",
        # When and how much is measured; what is measured, the protocol, stays.
        "measurements",
        "first_measurement_kimg",
        "generate_every",
        "num_samples",
        "sample_steps",
        "stop_on",
        # What is kept and logged:
        "checkpoints_total_limit",
        "save_every_minutes",
        "curve_every",
        "log_models",
    )
)


class Stop:
    """A request to stop, by one of the signals that end a trainer, that the loop looks at; a second Ctrl-C interrupts at once.

    A SIGTERM after a Ctrl-C is the same request: `mlflow run` sends one when the terminal has sent the other. Slurm sends
    SIGUSR1 or SIGUSR2, as configured (`--signal`, submitit), before it takes the machine away. A closed terminal sends SIGHUP;
    what is printed from then on is dropped, as an error of the terminal would end the run before it is saved.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        for number in stop_signals():
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        for output in [output for output in self._terminals if not os.isatty(output)]:
            self._terminals.remove(output)
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number


def check_project() -> None:
    """Refuse to run another clone's code: an editable install elsewhere would shadow this project."""
    here, imported = Path(__file__).resolve().parents[1], Path(mlflow_icr.__file__).resolve().parents[1]
    if here != imported:
        raise ValueError(f"mlflow_icr comes from {imported}, but trainers from {here}; install this project: pip install -e .")


def resumes(resume: str, output_dir: Path) -> bool:
    """Whether a run is resumed: `yes`, `no`, or with `auto` where the output folder holds one. Raises ValueError."""
    refuse_unknown("resume", resume, list(RESUME))
    return resume == "yes" or (resume == "auto" and (output_dir / CONFIG).exists())


def prepare_folder(output_dir: Path, config: TrainConfig | None, changes: Mapping[str, Any], resume: bool) -> TrainConfig:
    """The configuration to run, after refusing an output folder that is taken or a resumption that does not fit."""
    path = output_dir / CONFIG
    if not resume:
        assert config is not None
        if (output_dir / HISTORY).exists() or path.exists():
            raise ValueError(f"output_dir is {str(output_dir)!r}, which holds a run; expected a new folder, or --resume")
        return config
    if not path.exists():
        raise ValueError(f"output_dir is {str(output_dir)!r}, which holds no {CONFIG}; --resume expects the folder of a run")
    if (output_dir / HISTORY).exists():
        read_history(output_dir)  # refuses a damaged one now, not when the first measurement is to be added
    saved = config_from(read_values(path))
    for key, value in changes.items():
        settled = (key, value) in (("encoder", "auto"), ("sigma_data", None))  # the run has the value that was chosen
        typed = OPTIONS[key].typed(value) if key in OPTIONS else value  # a file has lists where there are tuples
        if saved.get(key) != typed and not settled and key not in MAY_CHANGE:
            raise ValueError(f"{key} is {value!r}, but the run to resume has {saved.get(key)!r}; expected the same")
    return saved.changed(**{key: value for key, value in changes.items() if key in MAY_CHANGE})


def note_changes(output_dir: Path, config: TrainConfig, images_seen: int) -> dict[str, str]:
    """Write down how a resumed run's configuration differs from the one in its folder; returns the differences as tags."""
    path = output_dir / CONFIG
    old = read_values(path) if path.exists() else config.flat()
    changes = {key: [old.get(key), value] for key, value in config.flat().items() if old.get(key, value) != value}
    if not changes:
        return {}
    with (output_dir / CHANGES).open("a") as file:
        file.write(json.dumps({"images_seen": images_seen, "changes": changes}) + "\n")
    return {f"icr.changed.{key}": f"{a} -> {b} at {images_seen} images" for key, (a, b) in changes.items()}


def logs_here() -> bool:
    """Whether this process is the one that logs: rank 0, by torchrun's or accelerate's variables, before either is imported."""
    return int(os.environ.get("RANK", "0")) == 0


def configure(arguments: Any) -> tuple[TrainConfig, Path, dict[str, str], str | None, bool]:
    """Everything that the command line says, checked. Raises ValueError for impossible values."""
    check_launcher(os.environ)
    changes, config = settled_paths(config_changes(arguments)), None
    output_dir = output_folder(arguments.output_dir) if logs_here() else Path(arguments.output_dir).expanduser()
    resume = resumes(arguments.resume, output_dir)
    if arguments.preset is not None and arguments.config is not None:
        raise ValueError(f"preset is {arguments.preset!r} and config {arguments.config!r}; expected one of them")
    if arguments.config is not None:
        config = config_from(with_changes(settled_paths(read_values(Path(arguments.config).expanduser())), changes))
        changes = config.flat()
    elif arguments.preset is not None:
        values = preset_values(arguments.preset)
        if not resume:  # a resumed run has its configuration already
            config = config_from(with_changes(values, changes))
        changes["preset"] = arguments.preset
    elif "data" in changes and not resume:
        values, lines = plan_for(with_changes({}, changes))
        config = config_from(with_changes(values, {}))
        if logs_here() and (is_launched() or arguments.num_processes == 1):
            print(*lines, sep="\n", flush=True)
    elif not resume:
        raise ValueError(f"preset is not given; expected one of {', '.join(preset_names())}, or --data alone")
    tags = parse_tags(arguments.tag)
    config = prepare_folder(output_dir, config, changes, resume)
    check_apart(output_dir, config.data.source)
    if arguments.register is not None:
        check_register(arguments.register, config.run.log_models)
    check_project()
    if not is_launched():
        check_processes(arguments.num_processes, config)
    return config, output_dir, tags, arguments.run_name, resume


def train_run(
    run: Run, stop: Stop, output_dir: Path, tags: Mapping[str, str], resume: bool, options: Mapping[str, str | None]
) -> str:
    """Train, measure, record and save until the end or a request to stop; returns FINISHED or KILLED.

    `options` are further ones of `folder_tracker`.
    """
    from mlflow_icr.extraction.files import write_whole
    from mlflow_icr.reporting import conclude
    from mlflow_icr.tracking import folder_tracker
    from trainers.console import Console

    tracker = None
    console = Console(run.config, shown=run.is_main, images_seen=run.state.images_seen)
    if run.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        tags = {**tags, **note_changes(output_dir, run.config, run.state.images_seen)}
        content = yaml.safe_dump(run.config.grouped(), sort_keys=False).encode()
        write_whole(output_dir / CONFIG, lambda file: file.write(content))  # a resumption must not find half of it
        # A resumed run continues the MLflow run of its folder.
        tracker = folder_tracker(output_dir, resume=resume, log_models=run.config.run.log_models, **options)  # type: ignore[arg-type]
        tracker.open(run.params(), {**run.tags(), **tags})
        run.show_data(tracker)
    status = "FAILED"
    try:
        status = run.train_to_end(tracker, console, lambda: stop.signal is not None)
    except KeyboardInterrupt:
        status = "KILLED"
    finally:
        console.close()
        if tracker is not None:
            try:
                if status != "FAILED":
                    run.conclude(tracker)
                    conclude(tracker)
            finally:  # a full disk may take no table: every tracker gets the run's status all the same
                verdict = tracker.verdict
                console.summary(tracker.close(status), verdict, status, output_dir)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input, 128 + signal when stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    arguments = train_parser().parse_args(argv)
    try:
        config, output_dir, tags, run_name, resume = configure(arguments)
        if arguments.num_processes > 1 and not is_launched():
            return launch(arguments.num_processes, sys.argv[1:] if argv is None else argv, output_dir)
        stop = Stop()
        set_status = end_as_rank()
        from trainers.agreement import TrainingError
        from trainers.run import Run  # torch, diffusers and accelerate, once the input is known to be good

        run = Run(config, output_dir, resume=resume)
    except (ValueError, OSError) as error:
        if logs_here():
            print(f"trainers.train: error: {error}", file=sys.stderr)
        return 2
    try:
        # These are not in the configuration, which trackers show: an address can be a secret.
        options = {"run_name": run_name, "on_verdict": arguments.on_verdict, "register": arguments.register}
        status = train_run(run, stop, output_dir, tags, resume, options)
    except OSError as error:  # a full disk, most of all: what was measured before is whole, and so is the last checkpoint
        print(f"trainers.train: error: {error}; continue with --resume when that is fixed", file=sys.stderr)
        return 1
    except TrainingError as error:
        if logs_here():
            print(f"trainers.train: error: {error}", file=sys.stderr)
        run.end()
        return set_status(1)
    run.end()
    return set_status(0 if status == "FINISHED" else 128 + (stop.signal or signal.SIGINT))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    sys.exit(main())

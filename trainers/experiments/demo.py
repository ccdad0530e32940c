"""A model on few images and a control on many, with the same budget: one turns from generalizing to memorizing."""

from __future__ import annotations

import argparse
import csv
import logging
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_icr.monitoring.evidence import ratio_key
from mlflow_icr.monitoring.plots import COLOURS
from mlflow_icr.monitoring.series import HISTORY, read_history
from mlflow_icr.monitoring.summary import summarise
from mlflow_icr.monitoring.verdict import verdict
from trainers.command_line import CommandLine, add_config_flags, config_changes, config_flags
from trainers.config import TrainConfig, load_config, preset_names
from trainers.data import load_source
from trainers.experiments.address import chart_address, study_search, without_secrets
from trainers.experiments.siblings import Sibling, run_siblings
from trainers.launch import check_processes
from trainers.launchers.job import FINISHED
from trainers.places import settled_paths
from trainers.train import Stop, check_project

logger = logging.getLogger(__name__)

AUTO = "auto"
COLUMNS = {
    "num_images": "training images",
    "verdict": "verdict",
    "turned_at_images_seen": "turned at",
    "mem_onset_images_seen": "copies begin at",
    "mem_ratio_end": "copies at the end",
    "icr_min": "lowest ICR",
    "icr_min_images_seen": "at images seen",
    "icr_end": "ICR at the end",
}


@dataclass(frozen=True)
class Study:
    """The two configurations, the study's name and its folder."""

    name: str
    folder: Path
    configs: Mapping[str, TrainConfig]  # by role
    parallel: int
    num_processes: int  # ranks of each


def _parser() -> CommandLine:
    parser = CommandLine(
        prog="generalization_to_memorization",
        usage="python -m trainers.experiments.demo [--preset NAME] [flags]",
        description=__doc__,
        epilog="example:\n  python -m trainers.experiments.demo --num-images 96 --seed 7\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset", default="digits", metavar="NAME", help=f"the preset of both runs: {', '.join(preset_names())}"
    )
    parser.add_argument(
        "--control-images", default=AUTO, metavar="N", help="training images of the control; default: all but the held-out ones"
    )
    parser.add_argument("--output-dir", default=AUTO, metavar="DIR", help="folder of the study; default: a new one in outputs/")
    parser.add_argument("--max-parallel", default="2", metavar="N", help="runs at the same time; default: 2")
    parser.add_argument("--num-processes", default="1", metavar="N", help="processes (ranks) of each run; default: 1")
    add_config_flags(parser)
    return parser


def _count(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{name} is {text!r}; expected a whole number >= 1")
    return int(text)


def plan(argv: Sequence[str] | None) -> Study:
    """The study that a command line asks for. Raises ValueError for impossible values, before anything runs."""
    arguments = _parser().parse_args(argv)
    changes = settled_paths(config_changes(arguments))
    limited = load_config(arguments.preset, changes)
    available = len(load_source(limited.data.source, limited.data.size, limited.data.split)) - limited.data.num_heldout
    control_images = available if arguments.control_images == AUTO else _count("control_images", arguments.control_images)
    if not limited.data.num_images < control_images <= available:
        raise ValueError(
            f"control_images is {control_images} and num_images {limited.data.num_images}; expected num_images < "
            f"control_images <= {available}, the images of {limited.data.source!r} less {limited.data.num_heldout} held out"
        )
    # Subsets nest, so the control has the limited run's images too: both are measured on the same images and views.
    probe = min(limited.monitor.probe_images, limited.data.num_images)
    control = load_config(arguments.preset, {**changes, "num_images": control_images, "probe_images": probe})
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{limited.preset}-n{limited.data.num_images}-seed{limited.run.seed}"
    folder = Path("outputs") / name if arguments.output_dir == AUTO else Path(arguments.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output_dir is {str(folder)!r}, which is not empty; expected a new folder")
    ranks = _count("num_processes", arguments.num_processes)
    check_processes(ranks, limited)
    check_project()
    runs = {"limited": limited, "control": control}
    return Study(name, folder, runs, _count("max_parallel", arguments.max_parallel), ranks)


def _flags(study: Study, role: str, config: TrainConfig) -> list[str]:
    # MLflow draws colours by chance, and two runs may get the same one; these are those of the figure.
    colour = COLOURS[list(study.configs).index(role)]
    return [
        *config_flags(config),
        f"--output-dir={study.folder / role}",
        f"--run-name={role} n={config.data.num_images}",
        f"--num-processes={study.num_processes}",
        *(f"--tag={tag}" for tag in (f"study={study.name}", f"role={role}", f"mlflow.runColor={colour}")),
    ]


Cells = Mapping[str, Any]  # one run's row of the table: numbers, and the verdict's word


def _table(study: Study, histories: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Cells]:
    table: dict[str, Cells] = {}
    for role, rows in histories.items():
        run_verdict = verdict(rows)
        cells: dict[str, Any] = {
            "num_images": float(study.configs[role].data.num_images),
            **summarise(rows),
            **run_verdict.summary(),
        }
        cells["verdict"] = run_verdict.state
        for name, key in (("icr_end", "repr/icr"), ("mem_ratio_end", "mem/ratio_l2")):
            if rows and key in rows[-1]:
                cells[name] = rows[-1][key]
        table[role] = cells
    return table


def _cell(key: str, row: Cells) -> str:
    if key not in row or isinstance(row[key], str):
        return str(row.get(key, "-"))
    return f"{row[key]:.3f}" if key in ("icr_min", "icr_end", "mem_ratio_end") else f"{row[key]:,.0f}"


def _text(table: Mapping[str, Cells]) -> str:
    """The table as aligned Markdown, which reads well in a terminal too."""
    rows = [["", *COLUMNS.values()]] + [[role, *(_cell(key, row) for key in COLUMNS)] for role, row in table.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _histories(study: Study) -> dict[str, list[dict[str, float]]]:
    """The rows of each run that has some, by role."""
    folders = {role: study.folder / role for role in study.configs}
    return {role: read_history(folder) for role, folder in folders.items() if (folder / HISTORY).exists()}


def conclude(study: Study) -> tuple[dict[str, Cells], list[Path]]:
    """Draw and tabulate the results of the runs; returns the table and the files in the study's folder."""
    from trainers.experiments.figure import study_figure

    histories = _histories(study)
    table = _table(study, histories)
    names = {role: f"{role}: {study.configs[role].data.num_images} images" for role in histories}
    first = next(iter(study.configs.values()))
    title = f"{first.data.source}, {first.optimizer.total_kimg:g} thousand images seen, seed {first.run.seed}"
    picture, sheet = study.folder / "study.png", study.folder / "study.csv"
    study_figure({names[role]: rows for role, rows in histories.items()}, title).savefig(picture, dpi=130)
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", *COLUMNS], extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows({"run": role, **row} for role, row in table.items())
    return table, [picture, sheet]


def write_page(study: Study) -> Path | None:
    """The report on the runs that have a history, in the study's folder; a failure costs a warning, and None is returned."""
    from mlflow_icr.reporting import gather_folder, write_report

    folders = [study.folder / role for role in study.configs if (study.folder / role / "history.jsonl").exists()]
    try:
        return write_report(
            [gather_folder(folder) for folder in folders], study.folder / "report" / "index.html", title=study.name
        )
    except Exception as error:  # the report only repeats what is on the disk already
        logger.warning("the report was not written (%s); mlflow-icr report %s writes it", type(error).__name__, study.folder)
        return None


def _share(study: Study, table: Mapping[str, Cells], experiment_id: str) -> str:
    """Share a view of MLflow's charts, titled by the verdicts; returns its address, or the plain one if no view is taken."""
    import mlflow
    from mlflow import MlflowClient

    from mlflow_icr.tracking.mlflow.shared_view import share

    uri = mlflow.get_tracking_uri()
    title = ", ".join(f"{role}: {row['verdict']}" for role, row in table.items())
    search, now_milliseconds, view = study_search(study.name), time.time_ns() // 1_000_000, None
    ratio = ratio_key(row for rows in _histories(study).values() for row in rows)
    try:
        view = share(MlflowClient(uri), uri, experiment_id, search, study.name, title, now_milliseconds, ratio)
    except Exception as error:  # of any kind: the runs matter more, and the plain address shows them too
        logger.warning("the view of the charts is not kept (%s); the address shows all charts", type(error).__name__)
    return chart_address(uri, experiment_id, study.name, view)


def run_study(study: Study, stop: Stop) -> int:
    """Train both runs and conclude, in an MLflow run of the study's own; returns the exit status."""
    import mlflow

    from mlflow_icr.tracking import MLflowSink, Tracker

    tracker = Tracker(study.folder, [MLflowSink(run_name=study.name)], resume="allow")
    first = study.configs["limited"]
    params = {name: first.get(name) for name in ("preset", "num_images", "total_kimg", "seed")}
    tracker.open(params, {"role": "study", "study_name": study.name})
    tracker.flush()  # which also makes the tables of a fresh local store: two runs at once would both try
    siblings = [Sibling(role, study.folder / role, _flags(study, role, config)) for role, config in study.configs.items()]
    status = "FAILED"
    try:
        ended = run_siblings(siblings, study.parallel, lambda: stop.signal is not None)
        if len(ended) == len(siblings) and all(outcome.status == FINISHED for outcome in ended.values()):
            status = "FINISHED"
        elif stop.signal:
            status = "KILLED"
        table, files = conclude(study)
        metrics = {f"{role}/{key}": value for role, row in table.items() for key, value in row.items() if key != "verdict"}
        tracker.metrics(metrics, first.total_images)
        for path in files:
            tracker.artifact(path)
        page = write_page(study)
        if page is not None:
            tracker.artifact(page, "report")
        address = _share(study, table, tracker.experiment_id or "0")
        note = f"{_text(table)}\n\n[Both curves]({address})\n\nRuns: `tags.study = '{study.name}'`"
        tracker.note(note)
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:  # MLflow would call a run FINISHED that its process left open
        tracker.close(status)
    _echo(study, status, table, address, mlflow.get_tracking_uri())
    if status == "FINISHED":
        return 0
    return 128 + stop.signal if stop.signal else 1


def _echo(study: Study, status: str, table: Mapping[str, Cells], address: str, tracking_uri: str) -> None:
    print(f"\n{_text(table)}\n")
    print(f"figure       {study.folder / 'study.png'}")
    print(f"report       {study.folder / 'report' / 'index.html'}")
    print(f"MLflow       {address}")
    if not tracking_uri.startswith(("http://", "https://")):
        print(f"             (after: make ui, or mlflow ui --backend-store-uri {without_secrets(tracking_uri)})")
    print(f"TensorBoard  tensorboard --logdir {study.folder}")
    if status != "FINISHED":
        print(f"{status}: not all runs came to their end; the first error is above", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 when a run failed, 2 for bad input, 128 + signal when stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        study = plan(argv)
    except (ValueError, OSError) as error:
        print(f"generalization_to_memorization: error: {error}", file=sys.stderr)
        return 2
    try:
        return run_study(study, Stop())
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())

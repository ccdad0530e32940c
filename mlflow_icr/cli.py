"""The command line `mlflow-icr`: thin, each command one call into the library."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from mlflow_icr.arguments import OneLineParser
from mlflow_icr.integrations.measuring import add_options  # itself light
from mlflow_icr.version import __version__

# Those of Li et al. 2026, figure 2, for EDM; here so that --help does not wait for torch.
SIGMAS = (0.01, 0.02, 0.06, 0.14, 0.3, 0.59, 1.09, 1.92, 3.26)


def _summary(arguments: argparse.Namespace) -> int:
    from mlflow_icr.monitoring.series import read_history
    from mlflow_icr.monitoring.summary import summarise

    print(json.dumps(summarise(read_history(arguments.folder)), indent=2))
    return 0


def _measure(arguments: argparse.Namespace) -> int:
    from mlflow_icr.integrations.measuring import measure

    return measure(arguments)


def _verdict(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from mlflow_icr.monitoring.verdict import verdict

    found = verdict(arguments.folder)
    print(json.dumps(asdict(found), indent=2) if arguments.json else found.text.replace("**", "").replace("\n\n", "\n"))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from mlflow_icr.monitoring.compare import compare

    print(json.dumps(asdict(compare(arguments.step_a, arguments.step_b, folder=arguments.folder)), indent=2))
    return 0


def _rank_images(arguments: argparse.Namespace) -> int:
    import csv

    from mlflow_icr.monitoring.ranking import rank_folder

    images, classes = rank_folder(arguments.folder, arguments.step)
    rows = classes if arguments.classes else images[: arguments.top]
    if not rows:
        raise ValueError(f"folder is {str(arguments.folder)!r}, whose training images have no classes")
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return 0


def _sweep_noise(arguments: argparse.Namespace) -> int:
    import csv
    from dataclasses import asdict, fields

    from mlflow_icr.extraction.adapters.choose import image_channels
    from mlflow_icr.extraction.images import folder_labels, load_folder, with_channels
    from mlflow_icr.extraction.pipelines import batch_size_for, load_denoiser
    from mlflow_icr.monitoring.plots import sweep_figure
    from mlflow_icr.monitoring.protocol import Protocol
    from mlflow_icr.monitoring.sweep import LabelledImages, SweepPoint, sweep_noise

    denoiser, resolution = load_denoiser(arguments.checkpoint)
    channels = image_channels(denoiser)
    images, labels = with_channels(load_folder(arguments.data, resolution), channels), folder_labels(arguments.data)
    labelled = None if labels is None else LabelledImages(images, labels)
    if arguments.test_data is not None:
        test_labels = folder_labels(arguments.test_data)
        if labels is None or test_labels is None:
            raise ValueError("test_data is given, but a folder has no classes; expected one subfolder for each class in both")
        test_images = with_channels(load_folder(arguments.test_data, resolution), channels)
        labelled = LabelledImages(images, labels, test_images, test_labels)
    protocol = Protocol(augmentation_level=arguments.augmentation_level, num_views=arguments.num_views, seed=arguments.seed)
    sweep = sweep_noise(
        denoiser,
        images,
        sigmas=arguments.sigma,
        layers=arguments.layers,
        protocol=protocol,
        labelled=labelled,
        batch_size=batch_size_for(denoiser),
    )
    if arguments.output_dir is not None:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        sweep_figure({arguments.checkpoint.name: sweep}).savefig(arguments.output_dir / "sweep.png", dpi=130)
        with (arguments.output_dir / "sweep.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(SweepPoint)])
            writer.writeheader()
            writer.writerows(asdict(point) for point in sweep.points)
    print(json.dumps(sweep.as_dict(), indent=2))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _export_tensorboard(arguments: argparse.Namespace) -> int:
    from mlflow_icr.bridge.run_export import Exported
    from mlflow_icr.bridge.tensorboard_export import export_runs

    told: set[str] = set()
    stopped = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        # Where Python cannot raise (in a destructor, say) the interrupt is ignored; the loop looks here too.
        stopped.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)

    def tell(run: Exported) -> None:
        if run.run_id not in told or run.new_points or run.new_images:
            told.add(run.run_id)
            print(f"{run.folder}: {run.new_points} points and {run.new_images} images added, {run.status}", flush=True)

    export_runs(
        arguments.logdir,
        experiment=arguments.experiment,
        run_ids=arguments.run_id,
        follow=arguments.follow,
        interval=arguments.interval,
        stop=stopped,
        tell=tell,
        say=_say,
    )
    if stopped.is_set():
        raise KeyboardInterrupt
    print(f"look at them with: tensorboard --logdir {arguments.logdir}" if told else "there are no runs yet")
    return 0


def _import_tensorboard(arguments: argparse.Namespace) -> int:
    from mlflow_icr.bridge.tensorboard_import import Imported, import_runs

    def tell(run: Imported) -> None:
        print(f"{run.run_name}: {run.new_points} points and {run.new_images} images added, run {run.run_id}", flush=True)

    import_runs(arguments.logdir, arguments.experiment, tell=tell, say=_say)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from mlflow_icr.reporting import report_command

    return report_command(arguments.target, arguments.output, log=arguments.log, say=_say)


def _doctor(arguments: argparse.Namespace) -> int:
    from mlflow_icr.doctor import doctor_command

    return doctor_command(arguments.tracking_uri, arguments.weights, as_json=arguments.json)


def _sync(arguments: argparse.Namespace) -> int:
    from mlflow_icr.tracking.mlflow.sync import sync

    found = sync(arguments.folder, new_run=arguments.new_run, say=lambda text: print(text, flush=True))
    return 0 if all(part.complete for part in found) else 1


def _best_checkpoint(arguments: argparse.Namespace) -> int:
    from mlflow_icr.tracking.checkpoints.best import check_output, choose, fetch

    check_output(arguments.output)
    if arguments.max and arguments.metric is None:
        raise ValueError("max is given without metric; expected --metric KEY, to take the highest value of")
    choice = choose(arguments.run_or_folder, metric=arguments.metric, maximum=arguments.max)
    _say(choice.why)
    print(fetch(choice, arguments.output))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="mlflow-icr", description="Is a diffusion model still learning, or copying?")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    measure = commands.add_parser(
        "measure",
        help="ICR of saved models on their training images, or copies and distances of generated images, as JSON",
    )
    measure.add_argument(
        "checkpoint", type=Path, nargs="?", help="a diffusers folder, such as checkpoints/000000131072 of a run"
    )
    measure.add_argument("--data", type=Path, help="folder of training images")
    measure.add_argument("--generated", type=Path, help="generated images instead of a checkpoint: a folder, .zip or .npz")
    measure.add_argument("--train", type=Path, help="with --generated: the training images, likewise")
    measure.add_argument("--heldout", type=Path, help="with --generated: images that were not trained on, likewise")
    measure.add_argument("--encoder", default="pixels", help="with --generated: pixels, inception, sscd, dinov2, clip, ...")
    measure.add_argument("--encoder-weights", type=Path, help="its file, or folder")
    measure.add_argument("--resolution", type=int, help="side in pixels; with --generated where images differ in size")
    measure.add_argument(
        "--output-dir",
        type=Path,
        help="with --generated: where scores.csv and the wall of pairs go; with "
        "--checkpoints: where the history does, default their folder's icr/",
    )
    measure.add_argument(
        "--run-id",
        help="an MLflow run to log to as well: with --checkpoints at their steps, else at --images-seen; default: "
        "MLFLOW_RUN_ID, which `mlflow run` sets",
    )
    add_options(measure)
    measure.set_defaults(run=_measure)

    sweep = commands.add_parser("sweep-noise", help="ICR over noise levels and layers of a saved pipeline: where to look")
    sweep.add_argument("checkpoint", type=Path, help="a diffusers folder")
    sweep.add_argument("--data", type=Path, required=True, help="folder of training images; subfolders are classes")
    sweep.add_argument("--test-data", type=Path, help="labelled images for the linear probe; default: cross-validation")
    sweep.add_argument("--sigma", type=float, nargs="+", default=list(SIGMAS), help="noise standard deviations")
    sweep.add_argument("--layers", nargs="+", default=[], help="default: all blocks of the network")
    sweep.add_argument("--augmentation-level", type=int, default=3)
    sweep.add_argument("--num-views", type=int, help="default: as many as the widest layer needs")
    sweep.add_argument("--seed", type=int, default=0)
    sweep.add_argument("--output-dir", type=Path, help="where sweep.png and sweep.csv go")
    sweep.set_defaults(run=_sweep_noise)

    summary = commands.add_parser("summary", help="lowest ICR, onset of copies and lead of a run's history, as JSON")
    summary.add_argument("folder", type=Path, help="an output folder, or its history.jsonl")
    summary.set_defaults(run=_summary)

    verdict = commands.add_parser("verdict", help="what a run's history says: generalizing, turning, memorizing or undecided")
    verdict.add_argument("folder", type=Path, help="an output folder, or its history.jsonl")
    verdict.add_argument("--json", action="store_true", help="all fields, as JSON")
    verdict.set_defaults(run=_verdict)

    ranking = commands.add_parser("rank-images", help="training images by their share in the residual energy, as CSV")
    ranking.add_argument("folder", type=Path, help="an output folder")
    ranking.add_argument("--step", type=int, help="images seen; default: the newest measurement")
    ranking.add_argument("--top", type=int, help="default: all")
    ranking.add_argument("--classes", action="store_true", help="classes instead of images, where there are labels")
    ranking.set_defaults(run=_rank_images)

    compare = commands.add_parser("compare", help="debiased ICR of a run at step B less step A, paired by image, as JSON")
    compare.add_argument("folder", type=Path, help="an output folder")
    compare.add_argument("step_a", type=int, metavar="A", help="images seen")
    compare.add_argument("step_b", type=int, metavar="B", help="images seen")
    compare.set_defaults(run=_compare)

    report = commands.add_parser(
        "report", help="one self-contained HTML page on a run, or on the runs of a study or experiment"
    )
    report.add_argument(
        "target", nargs="+", help="an output folder, a run's id, an experiment's name or id; several are compared"
    )
    report.add_argument("--output", type=Path, default=Path("report.html"), help="the file (default: report.html)")
    report.add_argument("--log", action="store_true", help="also upload it to the MLflow run, as report/index.html")
    report.set_defaults(run=_report)

    doctor = commands.add_parser("doctor", help="is this machine ready: versions, devices, MLflow, encoders, plugins; 1 if not")
    doctor.add_argument("--tracking-uri", help="default: MLFLOW_TRACKING_URI, or MLflow's own")
    doctor.add_argument("--weights", nargs="+", default=[], metavar="NAME=PATH", help="weights of encoders to check")
    doctor.add_argument("--json", action="store_true", help="a list of checks, as JSON")
    doctor.set_defaults(run=_doctor)

    sync = commands.add_parser("sync", help="deliver to MLflow what it missed of a run or study; a repeat adds nothing twice")
    sync.add_argument("folder", type=Path, help="an output folder, or one above several")
    sync.add_argument("--new-run", action="store_true", help="everything to a new run, such as on another server")
    sync.set_defaults(run=_sync)

    best = commands.add_parser("best-checkpoint", help="fetch the checkpoint to keep, as a diffusers folder")
    best.add_argument("run_or_folder", metavar="RUN", help="the id of an MLflow run, or an output folder")
    best.add_argument("--metric", metavar="KEY", help="that with the lowest value of it, such as repr/icr, not the verdict's")
    best.add_argument("--max", action="store_true", help="with --metric: the highest")
    best.add_argument("--output", type=Path, metavar="DIR", help="a new folder; default: where it is, or a temporary one")
    best.set_defaults(run=_best_checkpoint)

    export = commands.add_parser("export-tensorboard", help="MLflow runs as TensorBoard event files; a repeat adds what is new")
    which = export.add_mutually_exclusive_group(required=True)
    which.add_argument("--experiment", help="all runs of the experiment of this name")
    which.add_argument("--run-id", nargs="+", default=[], help="these runs, and those nested in them")
    export.add_argument("--logdir", type=Path, required=True, help="where each run gets a folder of its own")
    export.add_argument("--follow", action="store_true", help="go on until no run is running; Ctrl-C ends it before")
    export.add_argument("--interval", type=float, default=5.0, help="with --follow: seconds between two looks")
    export.set_defaults(run=_export_tensorboard)

    imports = commands.add_parser("import-tensorboard", help="event files as MLflow runs; a repeat adds what is new")
    imports.add_argument("logdir", type=Path, help="a folder; each folder with event files in or below it is a run")
    imports.add_argument("--experiment", required=True, help="its name; made where there is none")
    imports.set_defaults(run=_import_tensorboard)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 with one line for bad input, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError) as error:
        print(f"mlflow-icr: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mlflow-icr: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

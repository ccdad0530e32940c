"""The command line `mlflow-icr`: thin, each command one call into the library."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mlflow_icr.version import __version__


def _summary(arguments: argparse.Namespace) -> int:
    from mlflow_icr.monitoring.series import read_history
    from mlflow_icr.monitoring.summary import summarise

    print(json.dumps(summarise(read_history(arguments.folder)), indent=2))
    return 0


def _measure(arguments: argparse.Namespace) -> int:
    from mlflow_icr.extraction.images import load_folder
    from mlflow_icr.extraction.pipelines import load_denoiser
    from mlflow_icr.monitoring import ICRMonitor, Protocol

    denoiser, resolution = load_denoiser(arguments.checkpoint)
    protocol = Protocol(
        layer=arguments.layer,
        sigmas=tuple(arguments.sigma),
        augmentation_level=arguments.augmentation_level,
        num_images=arguments.num_images,
        num_views=arguments.num_views,
        seed=arguments.seed,
        ridge=arguments.ridge,
    )
    monitor = ICRMonitor(denoiser, load_folder(arguments.data, resolution), protocol)
    report = monitor.measure(arguments.images_seen)
    print(json.dumps(report.flat() | {"protocol_digest": report.protocol_digest}, indent=2))
    for key, why in report.absent.items():
        print(f"{key} is absent: {why}", file=sys.stderr)
    return 0


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlflow-icr", description="Is a diffusion model still learning, or copying?")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    measure = commands.add_parser("measure", help="ICR of a saved EDM pipeline on a folder of its training images, as JSON")
    measure.add_argument("checkpoint", type=Path, help="a diffusers folder, such as checkpoints/000000131072 of a run")
    measure.add_argument("--data", type=Path, required=True, help="folder of training images")
    measure.add_argument("--layer", default="decoder")
    measure.add_argument("--sigma", type=float, nargs="+", default=[0.29], help="noise standard deviations")
    measure.add_argument("--augmentation-level", type=int, default=3)
    measure.add_argument("--num-images", type=int, help="default: all of the folder")
    measure.add_argument("--num-views", type=int, help="default: as many as the layer's width needs")
    measure.add_argument("--seed", type=int, default=0)
    measure.add_argument("--ridge", type=float, default=0.0)
    measure.add_argument("--images-seen", type=int, default=0, help="written into the result as it is given")
    measure.set_defaults(run=_measure)

    summary = commands.add_parser("summary", help="lowest ICR, onset of copies and lead of a run's history, as JSON")
    summary.add_argument("folder", type=Path, help="an output folder, or its history.jsonl")
    summary.set_defaults(run=_summary)

    verdict = commands.add_parser("verdict", help="what a run's history says: generalizing, turning, memorizing or undecided")
    verdict.add_argument("folder", type=Path, help="an output folder, or its history.jsonl")
    verdict.add_argument("--json", action="store_true", help="all fields, as JSON")
    verdict.set_defaults(run=_verdict)

    compare = commands.add_parser("compare", help="debiased ICR of a run at step B less step A, paired by image, as JSON")
    compare.add_argument("folder", type=Path, help="an output folder")
    compare.add_argument("step_a", type=int, metavar="A", help="images seen")
    compare.add_argument("step_b", type=int, metavar="B", help="images seen")
    compare.set_defaults(run=_compare)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 with one line for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError) as error:
        print(f"mlflow-icr: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""`mlflow run . -e paper`: train what is missing, measure what is new, and write the page."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mlflow_icr.arguments import OneLineParser, dashed
from trainers.experiments.paper.figures import FIGURES
from trainers.experiments.paper.measurements import Folder, measure_all
from trainers.experiments.paper.page import write_page
from trainers.experiments.paper.plan import SCALES, Scale
from trainers.experiments.paper.trainings import Train, in_a_process, train_missing
from trainers.train import Stop

CIFAR10, VARIABLE = "uoft-cs/cifar10", "MLFLOW_ICR_CIFAR10"


def figure_numbers(text: str) -> list[int]:
    """`all`, or numbers: 2,4. Raises ValueError for others."""
    if text == "all":
        return sorted(FIGURES)
    numbers = [int(word) if word.strip().isdigit() else 0 for word in text.split(",")]
    if not set(numbers) <= set(FIGURES):
        raise ValueError(f"figures is {text!r}; expected all, or some of {', '.join(map(str, FIGURES))}, such as 2,4")
    return sorted(set(numbers))


def check(scale: Scale, data: str, root: Path) -> None:
    """Raise ValueError, before any work, where a training's flags make no configuration."""
    for training in scale.trainings():
        training.config(data, root)


def reproduce(
    scale: Scale, data: str, root: Path, page: Path, figures: Sequence[int], *, stop: Stop, train: Train | None
) -> int:
    """Train (None: only measure what is there), measure and write; returns the exit status."""
    folder = Folder(root)

    def wants_stop() -> bool:
        return stop.signal is not None

    failed = []
    if train is not None:
        failed = train_missing(scale, root, data, wants_stop, print, train)
    results = measure_all(scale, folder, wants_stop, print)
    root.mkdir(parents=True, exist_ok=True)
    (root / "results.json").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    claims = write_page(scale, results, page, figures, root / "results")
    for claim in claims:
        print(f"figure {claim.figure!s:10s}  {claim.outcome:12s}  {claim.claim}")
    print(f"page         {page / 'index.md'}")
    if stop.signal is not None:
        return 128 + stop.signal
    return 1 if failed else 0


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="paper",
        description=__doc__,
        epilog="example:\n  python -m trainers.experiments.paper --scale small --figures 2,4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--scale", default="small", metavar="NAME", help=f"size of the study: {', '.join(SCALES)}")
    parser.add_argument("--figures", default="all", metavar="N,...", help="numbers of the figures to draw; default: all")
    data = f"CIFAR-10: a folder, an archive or a name on the hub; default: ${VARIABLE}, or the hub's"
    parser.add_argument("--data", default=os.environ.get(VARIABLE, CIFAR10), metavar="DATA", help=data)
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder of runs and result files; the same command continues in it",
    )
    parser.add_argument(
        "--page-dir", type=Path, default=None, metavar="DIR", help="folder of the page; default: page/ in the output folder"
    )
    parser.add_argument(
        "--no-train", action="store_true", help="draw figures from existing checkpoints and result files; train nothing"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    arguments = _parser().parse_args(dashed(sys.argv[1:] if argv is None else argv))
    try:
        if arguments.scale not in SCALES:
            raise ValueError(f"scale is {arguments.scale!r}; expected one of {', '.join(SCALES)}")
        scale, figures = SCALES[arguments.scale], figure_numbers(arguments.figures)
        root = arguments.output_dir or Path("outputs") / f"paper-{scale.name}"
        check(scale, arguments.data, root)
    except (ValueError, OSError) as error:
        print(f"paper: error: {error}", file=sys.stderr)
        return 2
    page = arguments.page_dir or root / "page"
    return reproduce(
        scale, arguments.data, root, page, figures, stop=Stop(), train=None if arguments.no_train else in_a_process
    )

"""The command of the study: pretrain, fine-tune with the watch beside it, judge samples, write the page. Resumable."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from mlflow_icr.arguments import OneLineParser
from studies.fine_tuning.page import write_page
from studies.fine_tuning.runs import LENGTHS, all_runs, keep_results, pretrain, tune_and_watch, write_images

DOCS = Path(__file__).parents[2] / "docs"
VARIABLE = "MLFLOW_ICR_CIFAR10"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = OneLineParser(prog="fine_tuning", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--data", default=os.environ.get(VARIABLE), help=f"a zip with a folder for each class; default: ${VARIABLE}"
    )
    parser.add_argument("--target", default="horse", help="the class that is fine-tuned on")
    parser.add_argument("--work-dir", type=Path, default=Path("outputs/fine_tuning"), help="where models are")
    parser.add_argument("--results", type=Path, default=DOCS / "validation" / "fine_tuning", help="where result files go")
    parser.add_argument("--page", type=Path, default=DOCS / "fine-tuning.md", help="where the page goes")
    parser.add_argument("--pretrain-images-seen", type=int, default=131_072)
    parser.add_argument("--images-seen", type=int, nargs=3, default=LENGTHS, help="of 32, 128, 512 images")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="runs such as full-n32; default: all")
    parser.add_argument("--page-only", action="store_true", help="write the page from the result files that exist")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # which ends the programs that it started
    runs = [run for run in all_runs(arguments.images_seen) if not arguments.only or run.name in arguments.only]
    if not arguments.page_only:
        if arguments.data is None:
            parser.error(f"data is not given; expected --data ZIP, or ${VARIABLE}")
        work = arguments.work_dir
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{work.resolve()}/mlflow.db")
        write_images(Path(arguments.data), work / "data", arguments.target, sorted({run.num_images for run in runs}))
        base = pretrain(work, arguments.pretrain_images_seen)
        for run in runs:
            if not (arguments.results / f"{run.name}.json").exists():
                tune_and_watch(run, work, base)
                keep_results(run, work, base, arguments.results)
                write_page(arguments.results, arguments.page)
    write_page(arguments.results, arguments.page)
    return 0

"""The way of a recorded report is the one that the page on tracking shows."""

from __future__ import annotations

import re
import sys
import threading
from collections import defaultdict
from pathlib import Path
from types import FrameType

from mlflow_icr.monitoring.report import Report
from mlflow_icr.tracking import MLflowSink, TensorBoardSink, Tracker

ROOT = Path(__file__).parents[1]


def shown_files() -> set[str]:
    """The files that the page's first section names, below `mlflow_icr/`."""
    section = (ROOT / "docs/built/tracking.md").read_text().split("\n## ")[0]
    names = re.findall(r"`([\w/]+\.py)`", section)
    return {name if "/" in name else f"tracking/tensorboard/{name}" for name in names}


def test_a_report_passes_the_files_and_threads_of_the_page(tmp_path: Path) -> None:
    files: set[str] = set()
    threads: dict[str, set[str]] = defaultdict(set)  # by file, those that send
    following = threading.Event()

    def note(frame: FrameType, event: str, argument: object) -> None:
        _, package, file = frame.f_code.co_filename.partition("/mlflow_icr/")
        if following.is_set() and event == "call" and package and file.startswith("tracking/"):
            files.add(file)
            if frame.f_code.co_name == "send":
                threads[file].add(threading.current_thread().name)

    threading.setprofile(note)
    try:
        with Tracker(tmp_path, [MLflowSink(), TensorBoardSink(tmp_path)]) as tracker:
            tracker.open({"learning_rate": 1e-4})
            tracker.record(Report(1000, {"repr/icr_debiased": 0.5, "mem/ratio_l2": 0.0}))
            assert tracker.flush()
            sys.setprofile(note)
            following.set()
            tracker.record(Report(2000, {"repr/icr_debiased": 0.4, "mem/ratio_l2": 0.0}))
            assert tracker.flush()
            following.clear()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    assert files == shown_files()
    senders = [threads[f"tracking/{sink}/sink.py"] for sink in ("mlflow", "tensorboard")]
    assert [len(names) for names in senders] == [1, 1]
    assert not set.union(*senders) & {threading.current_thread().name}

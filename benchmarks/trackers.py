"""The cost of one report to the training thread: journal, MLflow and TensorBoard, against Accelerate's MLflow tracker.

Both log the same values of a training to a real `mlflow server` on this machine, turn by turn, when the other's have arrived;
ours also keeps them on the disk and writes TensorBoard's events. The ratio is the median of the pairs' ratios; the longest call
is what a step may have to wait. A line as long, written to the same disk with fsync, is the least that keeping costs.

Then three costs that must not grow: recording at row 1000 and at row 100 000, opening a folder with 100 MB of event files, and
bringing 300 rows to a store that has none of them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from accelerate.tracking import MLflowTracker

from benchmarks.results import keep
from mlflow_icr import Report
from mlflow_icr.extraction.files import append_line
from mlflow_icr.tracking import MLflowSink, TensorBoardSink, Tracker
from mlflow_icr.tracking.mlflow.sync import deliver_folder
from mlflow_icr.tracking.operations import Metrics, to_line

VALUES = 50  # as many as a measurement of a trainer has


def serve(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    log = (folder / "server.log").open("wb")
    server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return server, f"http://127.0.0.1:{port}"
        except OSError:
            if server.poll() is not None:
                raise RuntimeError((folder / "server.log").read_text()) from None
            time.sleep(0.2)


def growth(folder: Path, rows: tuple[int, int] = (1000, 100_000), count: int = 200) -> float:
    """The cost of a row in a folder that has so many, in the training thread."""
    medians = []
    for num_rows in rows:
        run = folder / f"rows{num_rows}"
        run.mkdir()
        history = "".join(json.dumps({"images_seen": i, "repr/icr": 0.5, "mem/ratio_l2": 0.1}) + "\n" for i in range(num_rows))
        (run / "history.jsonl").write_text(history)
        lines = (to_line(Metrics(i, i, {"repr/icr": 0.5, "mem/ratio_l2": 0.1})) for i in range(num_rows))
        (run / "events.jsonl").write_text("".join(lines))
        tracker = Tracker(run, [], resume="allow")
        tracker.begin()
        times = []
        for step in range(num_rows, num_rows + count):
            started = time.perf_counter()
            tracker.record(Report(step, {"repr/icr": 0.5, "mem/ratio_l2": 0.1}))
            times.append(time.perf_counter() - started)
        tracker.abandon()
        medians.append(statistics.median(times))
    first, last = (1000 * median for median in medians)
    print(f"one row, in the training thread: {first:.2f} ms at row {rows[0]}, {last:.2f} ms at row {rows[1]}")
    print(f"  ratio {last / first:.2f} (goal: at most 1.5)")
    return last / first


def resumption(folder: Path, megabytes: int = 100) -> float:
    """The seconds that opening takes beside so many event files."""
    run = folder / "large"
    with Tracker(run, [TensorBoardSink(run / "tensorboard")]) as tracker:
        tracker.open({}, {})
        tracker.record(Report(0, {"repr/icr": 0.5}))
    state = json.loads((run / "tensorboard" / "tensorboard.json").read_text())
    path = run / "tensorboard" / state["file"]
    with path.open("ab") as file:  # records as they are, over and over: what they say is the same
        whole = path.read_bytes()
        file.write(whole * (megabytes * 2**20 // len(whole)))
    state["committed"] = path.stat().st_size
    (run / "tensorboard" / "tensorboard.json").write_text(json.dumps(state))
    started = time.perf_counter()
    resumed = Tracker(run, [TensorBoardSink(run / "tensorboard")], resume="must")
    resumed.open({}, {})
    resumed.record(Report(1, {"repr/icr": 0.5}))
    resumed.flush_local()
    seconds = time.perf_counter() - started
    print(f"opening beside {path.stat().st_size / 2**20:.0f} MB of event files: {seconds:.2f} s (goal: 3 s)")
    resumed.abandon()
    return seconds


def catching_up(folder: Path, rows: int = 300) -> float:
    """The seconds that a store takes to get so many rows that it has none of."""
    run = folder / "late"
    tracker = Tracker(run, [MLflowSink(run_name="late")], mode="offline")
    tracker.open({}, {})
    for step in range(rows):
        tracker.record(Report(step, {"repr/icr": 0.5, "mem/ratio_l2": 0.1}))
    tracker.abandon()
    started = time.perf_counter()
    delivery = deliver_folder(run)
    seconds = time.perf_counter() - started
    assert delivery.complete, delivery.text
    print(f"bringing {rows} rows to a server that has none of them: {seconds:.2f} s (goal: 1 s)")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reports", type=int, default=100)
    parser.add_argument("--pause", type=float, default=0.3, help="seconds of training between two reports")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        server, os.environ["MLFLOW_TRACKING_URI"] = serve(folder)
        try:
            ours = Tracker(folder / "run", [MLflowSink(run_name="ours"), TensorBoardSink(folder / "run" / "tensorboard")])
            ours.open({}, {})
            theirs = MLflowTracker(experiment_name="theirs")
            theirs.start()
            times = []
            for step in range(arguments.reports):
                values = {f"repr/value{i}": (step + 1) / (i + 7) for i in range(VALUES)}
                started = time.perf_counter()
                ours.record(Report(step, values))
                our_seconds = time.perf_counter() - started
                ours.flush()  # else what goes on in the background of ours would be part of what theirs takes
                started = time.perf_counter()
                theirs.log(values, step=step)
                their_seconds = time.perf_counter() - started
                started = time.perf_counter()
                append_line(folder / "bare.jsonl", json.dumps(values) + "\n")
                times.append((our_seconds, their_seconds, time.perf_counter() - started))
                time.sleep(arguments.pause)
            ours.close("FINISHED")
            theirs.finish()
            late = catching_up(folder)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        opened, grown = resumption(folder), growth(folder)
    sides = [[1000 * t for t in side] for side in zip(*times[1:], strict=True)]  # the first ones import things
    print(f"one report of {VALUES} values, {len(sides[0])} of them, in the training thread:")
    names = ("ours, to journal, MLflow and TensorBoard", "Accelerate's MLflowTracker", "one line to the disk, with fsync")
    for name, side in zip(names, sides, strict=True):
        print(f"  {name:40}   median {statistics.median(side):6.2f} ms, longest {max(side):7.2f} ms")
    ratio = statistics.median(a / b for a, b in zip(sides[0], sides[1], strict=True))
    print(f"  ratio {ratio:.3f} (goal: at most 0.05)")
    keep(
        report_over_accelerate=ratio,
        report_median_ms=statistics.median(sides[0]),
        report_longest_ms=max(sides[0]),
        accelerate_longest_ms=max(sides[1]),
        catching_up_seconds=late,
        opening_seconds=opened,
        row_growth=grown,
    )


if __name__ == "__main__":
    main()

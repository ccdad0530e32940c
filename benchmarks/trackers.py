"""What logging one report costs the training thread: journal, MLflow and TensorBoard, against Accelerate's MLflow tracker.

Both log the same values of a training to a real `mlflow server` on this machine, turn by turn, when the other's have arrived;
ours also keeps them on the disk and writes TensorBoard's events. The ratio is the median of the pairs' ratios; the longest call
is what a step may have to wait. A line as long, written to the same disk with fsync, is the least that keeping costs.
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

from mlflow_icr import Report
from mlflow_icr.extraction.files import append_line
from mlflow_icr.tracking import MLflowSink, TensorBoardSink, Tracker

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reports", type=int, default=100)
    parser.add_argument("--pause", type=float, default=0.3, help="seconds of training between two reports")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        server, os.environ["MLFLOW_TRACKING_URI"] = serve(folder)
        try:
            sink, board = MLflowSink(run_name="ours"), TensorBoardSink(folder / "run" / "tensorboard")
            ours = Tracker(folder / "run", [sink, board])
            ours.open({}, {})
            theirs = MLflowTracker(experiment_name="theirs")
            theirs.start()
            times = []
            for step in range(arguments.reports):
                values = {f"repr/value{i}": (step + 1) / (i + 7) for i in range(VALUES)}
                started = time.perf_counter()
                ours.record(Report(step, values))
                mine = time.perf_counter() - started
                ours.settle()  # else what goes on in the background of ours would be part of what theirs takes
                sink.flush()
                board.flush()
                started = time.perf_counter()
                theirs.log(values, step=step)
                other = time.perf_counter() - started
                started = time.perf_counter()
                append_line(folder / "bare.jsonl", json.dumps(values) + "\n")
                times.append((mine, other, time.perf_counter() - started))
                time.sleep(arguments.pause)
            ours.close("FINISHED")
            theirs.finish()
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    sides = [[1000 * t for t in side] for side in zip(*times[1:], strict=True)]  # the first ones import things
    print(f"one report of {VALUES} values, {len(sides[0])} of them, in the training thread:")
    names = ("ours, to journal, MLflow and TensorBoard", "Accelerate's MLflowTracker", "one line to the disk, with fsync")
    for name, side in zip(names, sides, strict=True):
        print(f"  {name:40}   median {statistics.median(side):6.2f} ms, longest {max(side):7.2f} ms")
    ratio = statistics.median(a / b for a, b in zip(sides[0], sides[1], strict=True))
    print(f"  ratio {ratio:.3f} (goal: at most 0.05)")


if __name__ == "__main__":
    main()

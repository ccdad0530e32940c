"""The speed of the TensorBoard export, and whether its memory stays flat.

A run with many points is exported, and before it one with a tenth of them, each by a process of its own from one temporary
sqlite store; peak memory is that of the process, after its imports and at its end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.results import keep

KEYS = 4


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kB on Linux


def fill(points: int, one_key: bool) -> str:
    """A run with that many points, logged 1000 at a time; returns its id."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient()
    run_id: str = client.create_run("0", run_name=f"{points} points").info.run_id
    keys = 1 if one_key else KEYS
    started = time.perf_counter()
    for start in range(0, points, 1000):
        numbers = range(start, min(start + 1000, points))
        metrics = [Metric(f"repr/metric_{i % keys}", 1 / (i + 1), 1_700_000_000_000 + i, i // keys) for i in numbers]
        client.log_batch(run_id, metrics=metrics)
    print(f"{points:9} points logged in {time.perf_counter() - started:6.1f} s", flush=True)
    return run_id


def export(run_id: str, logdir: Path) -> None:
    """Export one run in this process and print its time and memory as JSON."""
    from mlflow_icr.bridge.tensorboard_export import Exporter

    exporter = Exporter(logdir)
    run = exporter.client.get_run(run_id)
    before, started, used = peak_mib(), time.perf_counter(), time.process_time()
    added = exporter.run(run).new_points
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    print(json.dumps({"points": added, "seconds": seconds, "cpu": cpu, "before": before, "peak": peak_mib()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--one-key", action="store_true", help=f"all points in one metric instead of {KEYS}")
    parser.add_argument("--of", nargs=2, metavar=("RUN_ID", "LOGDIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.of:
        export(arguments.of[0], Path(arguments.of[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{temporary}/mlflow.db"
        growth = []
        for points in (arguments.points // 10, arguments.points):
            run_id = fill(points, arguments.one_key)
            command = [sys.executable, __file__, "--of", run_id, f"{temporary}/tensorboard"]
            usage = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            growth.append(usage["peak"] - usage["before"])
            print(
                f"{usage['points']:9} points exported in {usage['seconds']:6.1f} s ({usage['cpu']:.1f} s of CPU), "
                f"{usage['points'] / usage['seconds']:.0f} points/s, peak memory +{growth[-1]:.0f} to {usage['peak']:.0f} MiB",
                flush=True,
            )
        print(f"{growth[1] - growth[0]:+.0f} MiB for ten times the points (goals: about 0; a million points in under 60 s)")
        speed = usage["points"] / usage["seconds"]
        keep(export_seconds=usage["seconds"], export_points_per_second=speed, export_growth_mib=growth[1] - growth[0])


if __name__ == "__main__":
    main()

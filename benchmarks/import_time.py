"""Import time of all names of `mlflow_icr` over torch's, each in a fresh process, in turn; the ratio is the pairs' median."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys


def seconds(module: str) -> float:
    """Seconds that a fresh interpreter takes to import everything in a module, without its own start."""
    code = f"import time; t = time.perf_counter(); from {module} import *; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=11)
    seconds("mlflow_icr")  # reads the files into the cache
    pairs = [(seconds("mlflow_icr"), seconds("torch")) for _ in range(parser.parse_args().pairs)]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"import mlflow_icr {ours:.2f} s  import torch {theirs:.2f} s  ratio {ratio:.3f} (goal: at most 1.10)")


if __name__ == "__main__":
    main()

"""The gain of a second rank: images per second on two ranks over twice those on one, one core each.

Each is a training of its own (torchrun, gloo, the digits preset with a batch of 96), timed by rank 0 over the same steps, in
turn, several times. Both ranks share one machine's memory and caches, and gloo has no device to overlap its sums with.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.results import keep

BATCH = 96


def worker(steps: int) -> None:
    import torch

    from trainers.config import load_config
    from trainers.loop import train
    from trainers.run import Run

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(load_config("digits", {"batch_size": BATCH}), Path(folder))
        states = train(run.state, run.inputs, run.family, run.accelerator)
        for _ in range(20):
            next(states)
        started = time.perf_counter()
        for _ in range(steps):
            next(states)
        if run.is_main:
            print(f"rate {steps * BATCH / (time.perf_counter() - started)}", flush=True)
        run.end()


def rate(ranks: int, steps: int) -> float:
    """Images per second of a training on so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    completed = subprocess.run([*command, f"--worker={steps}"], env=environment, capture_output=True, text=True, check=True)
    return float(next(line for line in completed.stdout.splitlines() if line.startswith("rate")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker)
    pairs = [(rate(1, arguments.steps), rate(2, arguments.steps)) for _ in range(arguments.pairs)]
    one_rank, two_ranks = (statistics.median(side) for side in zip(*pairs, strict=True))
    efficiency = statistics.median(b / (2 * a) for a, b in pairs)
    print(f"images/s on one rank {one_rank:.0f}, on two {two_ranks:.0f}: scaling efficiency {efficiency:.3f}")
    keep(ranks_efficiency=efficiency)


if __name__ == "__main__":
    main()

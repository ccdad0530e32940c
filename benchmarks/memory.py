"""Memory of a monitor of a million images, without the images: a process's peak over its peak before there was a monitor.

The images are one image a million times, so that they take no memory themselves; nothing here may copy them. A batch goes
through the network first, so that its activations are not counted.
"""

from __future__ import annotations

import argparse
import resource

import torch
from torch import nn

from benchmarks.results import keep
from mlflow_icr import EDMDenoiser, ICRMonitor
from trainers.config import load_config
from trainers.families import family_of

SIDE, IMAGES, GOAL = 64, 1_000_000, 200


def peak() -> float:
    """The largest resident size of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def network_of(channels: int) -> nn.Module:
    config = load_config("digits", {"block_channels": [8, 16], "resolution": SIDE})
    return family_of(config).build(channels, SIDE).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    denoiser, size = EDMDenoiser(network_of(arguments.channels)), arguments.batch_size
    images = torch.randint(256, (1, arguments.channels, SIDE, SIDE), dtype=torch.uint8).expand(IMAGES, -1, -1, -1)
    with torch.no_grad():
        denoiser(torch.randn(size, arguments.channels, SIDE, SIDE), 0.29)
    before = peak()
    monitor = ICRMonitor(denoiser, images, batch_size=size)
    monitor_memory = peak() - before
    monitor.measure(0)
    p, measured = monitor.protocol, peak() - before
    keep(monitor_of_a_million_mb=measured)
    print(f"{IMAGES} images of {arguments.channels}x{SIDE}x{SIDE}, {p.num_images} measured in {p.num_views} views: ", end="")
    print(f"a monitor takes {monitor_memory:.0f} MB, with a measurement {measured:.0f} (goal: less than {GOAL})")


if __name__ == "__main__":
    main()

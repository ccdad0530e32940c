"""The cost of a measurement over that of the forward passes that it needs.

Baseline: the same batches of views through the same network, left at the same layer, and the whole passes whose errors are
compared, of images and their views at four noise levels; nothing else. The two are timed in turn, several times; the ratio is
the median of the pairs' ratios. The first measurement, which also makes the views, is printed beside it. A measurement has the
interval and all values that come from errors; companions and pictures are off.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import torch

from benchmarks.results import keep
from mlflow_icr import EDMDenoiser, ICRMonitor, Protocol
from mlflow_icr.extraction import Tap
from mlflow_icr.monitoring.errors import LEVELS
from trainers.config import load_config
from trainers.families import family_of

Call = tuple[torch.Tensor, torch.Tensor | float]  # noised images (B, C, H, W) and their noise level


class Recorder:
    """A denoiser that records its calls."""

    def __init__(self, denoiser: EDMDenoiser) -> None:
        self.denoiser, self.network = denoiser, denoiser.network
        self.calls: list[Call] = []

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        """The denoised images (B, C, H, W)."""
        self.calls.append((x, sigma))
        return self.denoiser(x, sigma)


def whole_passes(monitor: ICRMonitor, denoiser: EDMDenoiser) -> list[Call]:
    """Noised images (B, C, H, W) and noise levels of a measurement's whole passes."""
    recorder, sigma = Recorder(denoiser), monitor.protocol.sigmas[0]
    for level in (1.0, *LEVELS):
        monitor.errors.read(recorder, level * sigma, monitored=level == 1)
    return recorder.calls


def bare(
    monitor: ICRMonitor,
    denoiser: EDMDenoiser,
    batches: list[torch.Tensor],
    whole: list[Call],
) -> float:
    """Seconds of the forward passes alone, truncated and whole."""
    sigma = monitor.protocol.sigmas[0]
    started = time.perf_counter()
    with Tap(denoiser.network, monitor.protocol.layer) as tap:
        for views in batches:
            tap(partial(denoiser, views.flatten(0, 1), sigma))
    with torch.no_grad():
        for x, level in whole:
            denoiser(x, level)
    return time.perf_counter() - started


def compare(name: str, channels: list[int], resolution: int, images: int, views: int, repeats: int) -> float:
    config = load_config("digits", {"block_channels": channels, "resolution": resolution, "num_images": images})
    # The cost of a pass does not depend on what the images show.
    data = torch.randint(
        256, (images, 1, resolution, resolution), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    denoiser = EDMDenoiser(family_of(config).build(1, resolution).eval())
    monitor = ICRMonitor(denoiser, data, Protocol(num_images=images, num_views=views))
    first = monitor.measure(0).values["perf/measure_seconds"]
    batches = list(monitor.reader.views(monitor.protocol.sigmas[0], torch.device("cpu")))
    whole = whole_passes(monitor, denoiser)
    bare(monitor, denoiser, batches, whole)
    pairs = [
        (monitor.measure(i).values["perf/measure_seconds"], bare(monitor, denoiser, batches, whole))
        for i in range(1, repeats + 1)
    ]
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{name:28} {images} x {views} views  D = {monitor.dim:4}  measure {ours:7.3f} s  bare {theirs:7.3f} s", end="")
    print(f"  ratio {ratio:.3f} (goal: at most 1.25)  first, with views made: {first / theirs:.2f}")
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--large", action="store_true", help="only the large case: 4096 images, D = 512; some ten minutes")
    arguments = parser.parse_args()
    repeats = arguments.repeats
    if arguments.large:
        compare("wide, many images", [128, 512], 8, 4096, 2, 1)
        return
    keep(
        measurement_digits=compare("digits preset", [32, 64], 8, 128, 8, repeats),
        measurement_digits_control=compare("digits preset, control", [32, 64], 8, 1024, 2, repeats),
        measurement_16x16=compare("16x16, wider", [64, 128], 16, 512, 2, max(3, repeats // 3)),
    )


if __name__ == "__main__":
    main()

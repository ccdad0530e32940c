"""The share of a training's wall time that monitoring takes, in the default demo and in `cifar10-4096`.

The demo's limited run is trained for some steps, and a measurement and a judgement of samples are timed: the share is that of
the preset's whole budget at these costs. A training step and a measurement of `cifar10-4096`, which a GPU trains for days, are
timed on the same device at a small batch and with few probe images, and scaled to the preset's numbers: both are passes of the
same network, whose costs are proportional to images.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.results import keep
from mlflow_icr import ICRMonitor
from trainers.config import TrainConfig, load_config
from trainers.loop import train
from trainers.run import Run


def seconds_per_image(run: Run, steps: int) -> float:
    states = train(run.state, run.inputs, run.family, run.accelerator)
    for _ in range(3):
        next(states)
    started = time.perf_counter()
    for _ in range(steps):
        next(states)
    return (time.perf_counter() - started) / (steps * run.config.optimizer.batch_size)


def demo() -> None:
    config = load_config("digits", {})
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, Path(folder))
        training = seconds_per_image(run, 100) * config.total_images
        count, samples = len(run.schedule), len(run.generate_at)
        run.monitor.measure(0)  # makes the views, once
        started = time.perf_counter()
        run.monitor.measure(1)
        measuring = (time.perf_counter() - started) * count
        run.generation.measure(0)
        started = time.perf_counter()
        run.generation.measure(1)
        generating = (time.perf_counter() - started) * samples
    whole = training + measuring + generating
    print(f"demo (digits preset, {config.optimizer.total_kimg:g} kimg, {count} measurements, {samples} with samples):")
    print(f"  representation {measuring / whole:.3f} of the wall time (goal: under 0.10), samples {generating / whole:.3f}")
    keep(demo_representation_share=measuring / whole, demo_samples_share=generating / whole)


def scaled(name: str, batch: int, probe: int) -> None:
    config: TrainConfig = load_config(name, {})
    network = ("resolution", "block_channels", "layers_per_block", "attention_resolutions", "dropout", "probe_views")
    sizes = {"batch_size": batch, "num_images": probe, "probe_images": probe, "num_samples": 2}
    small = load_config("digits", {field: config.get(field) for field in network} | sizes)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(small, Path(folder))
        image = seconds_per_image(run, 2)
        monitor: ICRMonitor = run.monitor
        monitor.measure(0)
        started = time.perf_counter()
        monitor.measure(1)
        measurement = (time.perf_counter() - started) * config.monitor.probe_images / probe
    whole = config.monitor.measurements * measurement
    share = whole / (config.total_images * image + whole)
    times = measurement / image
    print(f"{name}: a training image takes {1000 * image:.0f} ms on this device, a measurement {times:.0f} times as long")
    budget = f"{config.monitor.measurements} in {config.optimizer.total_kimg:g} kimg"
    print(f"  {budget}: {share:.5f} of the wall time (goal: under 0.02)")
    if name == "cifar10-4096":
        keep(cifar10_share=share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--probe", type=int, default=64)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    demo()
    scaled("cifar10-4096", arguments.batch, arguments.probe)


if __name__ == "__main__":
    main()

"""Training on a CUDA device, in bf16, beside a bare loop: images/s, peak memory, and the cost of a measurement.

The networks are those of the presets cifar10-4096 and imagenet256-sit-b2-20k (SiT-B/2). Images and latents are random, of the
right shapes: nothing is learned, and a step takes as long whatever they show. The bare loop has the same network, loss, fused
Adam and average; it draws its numbers on the device, by no key, and leaves convolutions in PyTorch's usual layout. The two
train in turn, a block of steps each, several times; the ratio is the median of the rounds' ratios. float32 is PyTorch's own:
convolutions of the measurement use TF32, which NVIDIA_TF32_OVERRIDE=0 turns off.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.presets import side_of, sigma_data_of
from mlflow_icr import ICRMonitor
from trainers.config import TrainConfig, load_config
from trainers.families import Family, family_of
from trainers.inputs import Inputs
from trainers.loop import TrainState, new_state, train
from trainers.optimizer import ema_beta

GIB = 2**30
CIFAR, SIT = "cifar10-4096", "imagenet256-sit-b2-20k"
CLASSES = 1000  # of ImageNet
FACTOR, LATENT_CHANNELS = 8, 4  # of the autoencoder that SiT is trained with
TINY: dict[str, dict[str, Any]] = {
    CIFAR: {
        "resolution": 8,
        "block_channels": [16, 16],
        "attention_resolutions": [4],
        "layers_per_block": 1,
        "probe_images": 16,
    },
    SIT: {"hidden_size": 32, "num_layers": 3, "num_heads": 2, "resolution": 64},
}


def inputs_of(config: TrainConfig, count: int) -> Inputs:
    """Random images, or random latents (mean and deviation) with classes."""
    generator = torch.Generator().manual_seed(0)
    if not config.network.autoencoder:
        shape = (count, 3, side_of(config), side_of(config))
        return Inputs(torch.randint(256, shape, dtype=torch.uint8, generator=generator))
    side = side_of(config) // FACTOR
    moments = torch.rand(count, 2 * LATENT_CHANNELS, side, side, generator=generator)
    return Inputs(moments, torch.randint(CLASSES, (count,), generator=generator), latent=True)


def ours(config: TrainConfig, family: Family, inputs: Inputs, device: torch.device) -> Iterator[TrainState]:
    """The trainer's loop, with Accelerate, as a run has it."""
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")
    state = new_state(family.build(*inputs.shape[:2]), config, accelerator)
    yield from train(state, inputs, family, accelerator)


def bare_loop(config: TrainConfig, family: Family, inputs: Inputs, device: torch.device) -> Iterator[None]:
    """The same training as short as it can be written in PyTorch."""
    network: Any = family.build(*inputs.shape[:2]).to(device).train()
    ema: Any = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.optimizer.learning_rate, fused=True)
    images, labels = inputs.images.to(device), None if inputs.labels is None else inputs.labels.to(device)
    count, seen = config.optimizer.batch_size, 0
    while True:
        chosen = torch.randint(len(images), (count,), device=device)
        noise = torch.randn(count, *inputs.shape, device=device)
        if labels is None:  # EDM, of pixels
            x, sd = images[chosen].float() / 127.5 - 1, sigma_data_of(config)
            sigma = (config.noise.p_mean + config.noise.p_std * torch.randn(count, device=device)).exp()
            s = sigma.view(-1, 1, 1, 1)
            total = s**2 + sd**2
            noised = x + s * noise
            with torch.autocast(device.type, torch.bfloat16):
                output = network(noised / total.sqrt(), sigma.log() / 4).sample
            denoised = sd**2 / total * noised + s * sd / total.sqrt() * output.float()
            loss = (total / (s * sd) ** 2 * (denoised - x) ** 2).mean()
        else:  # flow matching, of latents and classes
            mean, deviation = images[chosen].chunk(2, 1)
            x = mean + deviation * torch.randn_like(mean)
            dropped = torch.rand(count, device=device) < config.network.label_dropout
            classes = torch.where(dropped, CLASSES, labels[chosen])
            time_ = torch.rand(count, device=device)
            t = time_.view(-1, 1, 1, 1)
            with torch.autocast(device.type, torch.bfloat16):
                output = network((1 - t) * x + t * noise, 1000 * time_, class_labels=classes).sample
            loss = (output.float() - (noise - x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += count
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - ema_beta(config.optimizer, seen))
        yield


def wait(device: torch.device) -> None:
    """Wait until the device has done all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def rate(steps: Iterator[object], count: int, batch: int, device: torch.device) -> float:
    """Images per second over some steps."""
    wait(device)
    started = time.perf_counter()
    for _ in range(count):
        next(steps)
    wait(device)
    return count * batch / (time.perf_counter() - started)


def begin(steps: Iterator[Any], device: torch.device) -> tuple[Any, str]:
    """Run a loop's first steps; returns what it yields, and its peak memory over what was in use before."""
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        yielded = next(steps)
    wait(device)
    peak = (torch.cuda.max_memory_allocated() - before) / GIB if device.type == "cuda" else 0.0
    return yielded, f"{peak:.2f} GiB" if device.type == "cuda" else "not counted"


def measure(config: TrainConfig, family: Family, state: TrainState, images: torch.Tensor, images_per_second: float) -> None:
    """Print the cost of a measurement of the representation, and of all those in the preset's run."""
    monitor = ICRMonitor(family.denoiser(state.ema), images, config.protocol())
    first, second = (monitor.measure(step).values["perf/measure_seconds"] for step in (0, 1))
    share = config.monitor.measurements * second * images_per_second / config.total_images
    p = monitor.protocol
    print(
        f"  a measurement of {p.num_images} images in {p.num_views} views: {second:.2f} s, the first, with views made, ", end=""
    )
    print(f"{first:.2f} s; the preset's {config.monitor.measurements} take {share:.5f} of its training time (goal: under 0.02)")


def compare(preset: str, arguments: argparse.Namespace, device: torch.device) -> None:
    """Print a preset's lines."""
    changes = {"encoder": "pixels", "batch_size": arguments.batch_size, **(TINY[preset] if arguments.tiny else {})}
    config = load_config(preset, changes)
    inputs = inputs_of(config, 64 if arguments.tiny else 4096)
    family = family_of(config, CLASSES)
    loops = ours(config, family, inputs, device), bare_loop(config, family, inputs, device)
    (state, peak), (_, peak_bare) = (begin(steps, device) for steps in loops)
    rounds = [
        [rate(steps, arguments.steps, config.optimizer.batch_size, device) for steps in loops] for _ in range(arguments.rounds)
    ]
    trainer_rate, bare_rate = (statistics.median(side) for side in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    batch = config.optimizer.batch_size
    print(f"{preset}, batch {batch}: trainer {trainer_rate:.0f} images/s, bare loop {bare_rate:.0f}, ", end="")
    print(f"ratio {ratio:.3f} (goal: at least 0.95); peak memory {peak}, bare {peak_bare}")
    if preset == CIFAR:
        measure(config, family, state, inputs.images, trainer_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks: whether this runs, not how fast anything is")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step, on the one device (default: 128)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device is 'cpu'; expected --tiny with it, for these networks are not for CPUs")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("device benchmark: not run, there is no CUDA device (--device cpu --tiny tries the code)")
        return
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    networks = "tiny networks" if arguments.tiny else "the presets' networks"
    print(f"{name}, torch {torch.__version__}, bf16, {networks}; images and latents are random, nothing is learned")
    for preset in (CIFAR, SIT):
        compare(preset, arguments, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

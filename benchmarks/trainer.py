"""Training speed of our loop over a bare one: same network, batch, loss, optimizer and EMA, no Accelerate, no tracking.

Both train in turn, a block of steps each, several times; the ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from trainers.config import TrainConfig, load_config
from trainers.console import Console
from trainers.families import family_of
from trainers.loop import train
from trainers.run import Run


def bare_loop(images: torch.Tensor, config: TrainConfig) -> Iterator[None]:
    """EDM training as short as it can be written in PyTorch."""
    network = family_of(config).build(images.shape[1], config.resolution)
    ema = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True)
    x0, sd, seen = images.float() / 127.5 - 1, config.sigma_data, 0
    while True:
        x = x0[torch.randint(len(x0), (config.batch_size,))]
        sigma = (config.p_mean + config.p_std * torch.randn(config.batch_size)).exp()
        s = sigma.view(-1, 1, 1, 1)
        total = s**2 + sd**2
        noised = x + s * torch.randn_like(x)
        output = network(noised / total.sqrt(), sigma.log() / 4).sample
        denoised = sd**2 / total * noised + s * sd / total.sqrt() * output
        loss = (total / (s * sd) ** 2 * (denoised - x) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += config.batch_size
        beta = 0.5 ** (config.batch_size / min(config.ema_halflife_kimg * 1000, seen * config.ema_rampup_ratio))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - beta)
        yield


def rate(steps: Iterator[object], count: int, batch: int) -> float:
    """Images per second over some steps."""
    started = time.perf_counter()
    for _ in range(count):
        next(steps)
    return count * batch / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    config = load_config("digits", {})
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config, Path(folder))
        console = Console(config, shown=True)

        def ours() -> Iterator[None]:
            for state in train(run.state, run.inputs, run.family, run.accelerator):
                console.step(state)
                yield

        trainer, bare = ours(), bare_loop(run.data.train, config)
        for steps in (trainer, bare):
            rate(steps, 10, config.batch_size)
        pairs = [[rate(steps, arguments.steps, config.batch_size) for steps in (trainer, bare)] for _ in range(arguments.pairs)]
        console.close()
    ratio = statistics.median(a / b for a, b in pairs)
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"digits preset  trainer {a:.0f} images/s  bare loop {b:.0f} images/s  ratio {ratio:.3f} (goal: at least 0.9)")


if __name__ == "__main__":
    main()

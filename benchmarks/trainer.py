"""Training speed of our loop beside a bare one and one of diffusers' kind: same U-Net, batch and images.

The bare loop has the same loss, optimizer and average, and nothing else: no Accelerate, no tracking. The other has the parts
that diffusers' example train_unconditional.py has in a step: a DataLoader, noise of a scheduler, Accelerate, clipped gradients,
a schedule of the learning rate and EMAModel; images are ready as tensors, which saves it the time of that script's transforms.
All train in turn, a block of steps each, several times; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from benchmarks.presets import side_of, sigma_data_of
from benchmarks.results import keep
from trainers.config import TrainConfig, load_config
from trainers.console import Console
from trainers.families import family_of
from trainers.loop import train
from trainers.optimizer import ema_beta
from trainers.run import Run


def bare_loop(images: torch.Tensor, config: TrainConfig) -> Iterator[None]:
    """EDM training as short as it can be written in PyTorch."""
    network = family_of(config).build(images.shape[1], side_of(config))
    ema = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.optimizer.learning_rate, fused=True)
    x0, sd, seen = images.float() / 127.5 - 1, sigma_data_of(config), 0
    while True:
        x = x0[torch.randint(len(x0), (config.optimizer.batch_size,))]
        sigma = (config.noise.p_mean + config.noise.p_std * torch.randn(config.optimizer.batch_size)).exp()
        s = sigma.view(-1, 1, 1, 1)
        total = s**2 + sd**2
        noised = x + s * torch.randn_like(x)
        output = network(noised / total.sqrt(), sigma.log() / 4).sample
        denoised = sd**2 / total * noised + s * sd / total.sqrt() * output
        loss = (total / (s * sd) ** 2 * (denoised - x) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += config.optimizer.batch_size
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - ema_beta(config.optimizer, seen))
        yield


def diffusers_loop(images: torch.Tensor, config: TrainConfig) -> Iterator[None]:
    """Training of epsilon with the parts that diffusers' example for unconditional images uses."""
    accelerator = Accelerator(cpu=True)
    network = family_of(config).build(images.shape[1], side_of(config))
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.optimizer.learning_rate)
    scaled: Any = images.float() / 127.5 - 1  # a tensor is a data set for torch, but not by its types
    loader: Any = torch.utils.data.DataLoader(scaled, batch_size=config.optimizer.batch_size, shuffle=True, drop_last=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
    network, optimizer, loader, schedule = accelerator.prepare(network, optimizer, loader, schedule)
    bar, step = tqdm(disable=True), 0
    network.train()
    while True:
        for clean in loader:
            noise = torch.randn_like(clean)
            timesteps = torch.randint(0, 1000, (len(clean),)).long()
            noisy = scheduler.add_noise(clean, noise, timesteps)
            with accelerator.accumulate(network):
                loss = torch.nn.functional.mse_loss(network(noisy, timesteps).sample, noise)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            average.step(network.parameters())
            step += 1
            bar.update(1)
            logs = {
                "loss": loss.detach().item(),
                "lr": schedule.get_last_lr()[0],
                "step": step,
                "ema_decay": average.cur_decay_value,
            }
            bar.set_postfix(**logs)
            accelerator.log(logs, step=step)
            yield


def rate(steps: Iterator[object], count: int, batch: int) -> float:
    """Images per second over some steps."""
    started = time.perf_counter()
    for _ in range(count):
        next(steps)
    return count * batch / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
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

        images = run.data.train
        loops = (ours(), bare_loop(images, config), diffusers_loop(images, config))
        for steps in loops:
            rate(steps, 10, config.optimizer.batch_size)
        rounds = [
            [rate(steps, arguments.steps, config.optimizer.batch_size) for steps in loops] for _ in range(arguments.rounds)
        ]
        console.close()
    trainer, bare, diffusers = (statistics.median(side) for side in zip(*rounds, strict=True))
    of_bare, of_theirs = (statistics.median(rates[0] / rates[i] for rates in rounds) for i in (1, 2))
    print(f"digits preset, images/s: trainer {trainer:.0f}, bare loop {bare:.0f}, loop of diffusers' kind {diffusers:.0f}")
    print(f"  trainer over bare loop        {of_bare:.3f} (goal: at least 0.95)")
    print(f"  trainer over diffusers' kind  {of_theirs:.3f} (goal: above 1)")
    keep(trainer_over_bare=of_bare, trainer_over_diffusers=of_theirs)


if __name__ == "__main__":
    main()

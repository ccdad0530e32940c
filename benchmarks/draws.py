"""Time to draw a rank's share of a batch, on 1, 2 and 4 ranks: it falls with their number, as each draws its own rows alone.

The batch is that of the preset cifar10-4096, 512 images of 3 x 32 x 32. Shares are drawn one after the other in one process, in
turn, several times; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.presets import side_of
from benchmarks.results import keep
from trainers.batches import Order, draw_batch, rows_of
from trainers.config import load_config
from trainers.families import family_of
from trainers.inputs import Inputs

RANKS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=4)
    arguments = parser.parse_args()
    config = load_config("cifar10-4096", {})
    images = torch.zeros(config.data.num_images, 3, side_of(config), side_of(config), dtype=torch.uint8)
    inputs, family, order = Inputs(images), family_of(config), Order(config.data.num_images, config.run.seed)

    def seconds(ranks: int) -> float:
        rows = rows_of(config.optimizer.batch_size, 1, 0, ranks)
        started = time.perf_counter()
        for place in range(arguments.batches):
            draw_batch(inputs, order, family, place * config.optimizer.batch_size, rows)
        return (time.perf_counter() - started) / arguments.batches

    seconds(1)
    rounds = [[seconds(ranks) for ranks in RANKS] for _ in range(arguments.rounds)]
    for place, ranks in enumerate(RANKS):
        median = statistics.median(times[place] for times in rounds)
        ratio = statistics.median(times[place] / times[0] for times in rounds)
        goal = " (goal: at most 0.35)" if ranks == 4 else ""
        print(f"a rank's share of 512 CIFAR images on {ranks} rank(s): {1e3 * median:.1f} ms, {ratio:.3f} of one's{goal}")
        if ranks == 4:
            keep(draws_on_four_ranks=ratio)


if __name__ == "__main__":
    main()

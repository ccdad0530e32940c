"""The table of error views' ratios: sets of images x sizes x denoisers that cannot know the images.

Writes `docs/validation/views.csv`, and its table in `docs/validation.md`. Lines that exist are not measured again.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mlflow_icr import Denoiser, EDMDenoiser, Protocol, view_auc, view_error_ratio
from mlflow_icr.arguments import OneLineParser
from mlflow_icr.extraction import keyed_generator
from mlflow_icr.monitoring.errors import ErrorReader
from studies.validation.report import write_report
from studies.validation.results import read_results
from studies.validation.runs import CIFAR10, CIFAR10_VARIABLE, read_plan
from studies.validation.runs import RESULTS as RUNS
from studies.views.judges import JUDGES
from studies.views.results import ALLOWED, SIGMA, Line, farthest, read_lines, write_lines
from trainers.config import load_config
from trainers.data import load_data
from trainers.families import family_of
from trainers.families.edm import edm_loss, training_sigma

RESULTS = Path(__file__).parents[2] / "docs" / "validation" / "views.csv"
PROBES, OTHERS = 256, 1500
LARGEST_WIENER = 800  # values of an image, beyond which the estimate of their covariance is too poor
SETS = ("digits", "mnist5k", "fashion-mnist", "cifar10 in grey", "cifar10")
SIDES = (8, 16, 32)
LEVELS = {"": 1.0, "_half": 0.5, "_double": 2.0, "_fourfold": 4.0}  # noise, relative to the monitored level
# Steps of 64 images for which a network is trained: about 8 epochs of the other images, too few to know them by heart.
NETWORKS = {("digits", 8): 200, ("cifar10", 8): 200, ("cifar10 in grey", 8): 200, ("cifar10", 16): 100}


def images_of(name: str, side: int) -> tuple[Tensor, Tensor]:
    """Probe images and others, (N, C, H, W) uint8, of a set in an order of its own."""
    data = os.environ.get(CIFAR10_VARIABLE, CIFAR10) if name.startswith("cifar10") else name
    loaded = load_data(data, resolution=side, num_images=OTHERS, num_heldout=PROBES, seed=0)
    probes, others = loaded.heldout, loaded.train
    if name.endswith("in grey"):
        grey = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        probes, others = ((x * grey).sum(1, keepdim=True).round().to(torch.uint8) for x in (probes, others))
    return probes, others


def trained_network(others: Tensor, steps: int) -> Denoiser:
    """A small EDM network, trained on the other images (N, C, H, W) in [-1, 1], for too few steps to know them by heart."""
    config = load_config("digits", {"resolution": others.shape[-1], "block_channels": [32, 64], "layers_per_block": 1})
    network = family_of(config).build(others.shape[1], others.shape[-1])
    denoiser, optimizer = EDMDenoiser(network), torch.optim.Adam(network.parameters(), 2e-3)
    generator = keyed_generator("study-views-training", 0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, step / 50) * (1 - step / steps) ** 0.5
        x = others[torch.from_numpy(generator.integers(len(others), size=64))]
        sigma, noise = training_sigma(generator, 64, -1.2, 1.2), torch.from_numpy(generator.standard_normal(x.shape)).float()
        optimizer.zero_grad()
        torch.autograd.backward(edm_loss(denoiser, x, sigma, noise, 0.5))
        optimizer.step()
    network.eval()
    return denoiser


def line_of(images: str, kind: str, reader: ErrorReader, denoiser: Denoiser) -> Line:
    """The line of a denoiser: its errors on images and their views."""
    ratios: dict[str, float] = {}
    for name, level in LEVELS.items():
        errors = reader.read(denoiser, level * SIGMA, monitored=level == 1)
        assert errors.near is not None
        assert errors.far is not None
        ratios[f"near{name}"] = view_error_ratio(errors.image, errors.near).value
        ratios[f"far{name}"] = view_error_ratio(errors.image, errors.far).value
        if level == 1:
            auc = view_auc(errors.other, errors.single[reader.chosen])
    return Line(images, kind, **ratios, auc=auc.value, auc_low=auc.low, auc_high=auc.high, chosen=reader.chosen)


def measured(name: str, side: int, networks: bool, present: set[tuple[str, str]]) -> Iterator[Line]:
    """The lines of a set at a size that are not there yet, of judges or of networks."""
    channels = 3 if name == "cifar10" else 1
    images, values = f"{name}, {side}x{side}x{channels}", channels * side * side
    kinds = ["network"] if (name, side) in NETWORKS else []
    if not networks:
        kinds = [kind for kind in JUDGES if kind != "wiener" or values <= LARGEST_WIENER]
    missing = [kind for kind in kinds if (images, kind) not in present]
    if missing:
        probes, others = images_of(name, side)
        x = others.float() / 127.5 - 1
        reader = ErrorReader(probes, Protocol().resolve(images=len(probes), dim=8), 1024)
        for kind in missing:
            denoiser = trained_network(x, NETWORKS[name, side]) if kind == "network" else JUDGES[kind](x)
            yield line_of(images, kind, reader, denoiser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 where a ratio of near views is too far from 1."""
    parser = OneLineParser(prog="views", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    lines = read_lines(arguments.output)
    for networks, side, name in itertools.product((False, True), SIDES, SETS):  # what takes long comes last
        for line in measured(name, side, networks, {(x.images, x.denoiser) for x in lines}):
            lines.append(line)
            write_lines(arguments.output, lines)
            print(f"{line.images}, {line.denoiser}: near {line.near:.3f}, far {line.far:.2f}", flush=True)
    if arguments.output == RESULTS:
        write_report(read_results(RUNS), read_plan(), RESULTS.parents[1])
    return int(farthest(lines, "near") > ALLOWED)

"""Simulated features with a known ICR: the bias of each estimate, and how often the interval holds the truth."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

import numpy as np
import torch

from mlflow_icr import icr_interval

MEAN_EIGENVALUE = 0.7  # of all simulations but the mixture: an ICR of 0.588, as in the middle of a training


@dataclass(frozen=True)
class Family:
    """Features h = s + xi with covariances of these condition numbers, and with these tails."""

    name: str
    condition_residual: float = 20
    condition_invariant: float = 50
    # Multivariate t with 5 degrees of freedom: a scale of its own for each image and view, or one that an image's s and all
    # its views share.
    tails: str = "gaussian"
    clusters: int = 0


FAMILIES = (
    Family("Gaussian"),
    Family("Gaussian, isotropic", 1, 1),
    Family("Gaussian, anisotropic", 1000, 10000),
    Family("mixture of 5", clusters=5),
    Family("t, 5 degrees, each view", tails="view"),
    Family("t, 5 degrees, each image", tails="image"),
)
# N, K, D, with nu / D from 4 to 28.
SIZES = ((64, 3, 16), (64, 6, 64), (128, 4, 64), (128, 5, 128), (256, 3, 64), (256, 8, 64), (512, 2, 64), (1024, 2, 128))


def _factor(rng: np.random.Generator, dim: int, condition: float) -> np.ndarray:
    q, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    return q * np.geomspace(1, 1 / condition, dim) ** 0.5


def _scales(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Radial scales of a multivariate t with 5 degrees of freedom and unit covariance."""
    return np.sqrt(3 / rng.chisquare(5, shape))


def simulator(rng: np.random.Generator, family: Family, n: int, k: int, d: int) -> tuple[Callable[[], np.ndarray], float]:
    """A draw of features (N, K, D), new at every call, and their true ICR."""
    residual, invariant = _factor(rng, d, family.condition_residual), _factor(rng, d, family.condition_invariant)
    centres = rng.standard_normal((max(1, family.clusters), d))
    sigma = np.eye(d)
    if family.clusters:
        sigma = 0.5 * np.eye(d) + (centres - centres.mean(0)).T @ (centres - centres.mean(0)) / family.clusters
    inverse = np.linalg.inv(residual @ residual.T)
    invariant *= (MEAN_EIGENVALUE * d / np.trace(inverse @ invariant @ invariant.T)) ** 0.5
    truth = 1 / (1 + np.trace(inverse @ invariant @ sigma @ invariant.T) / d)

    def draw() -> np.ndarray:
        s, xi = rng.standard_normal((n, 1, d)), rng.standard_normal((n, k, d))
        if family.clusters:
            s = 0.5**0.5 * s + centres[rng.integers(0, family.clusters, n)][:, None]
        if family.tails == "view":
            s, xi = s * _scales(rng, (n, 1, 1)), xi * _scales(rng, (n, k, 1))
        elif family.tails == "image":
            scale = _scales(rng, (n, 1, 1))
            s, xi = s * scale, xi * scale
        return s @ invariant.T + xi @ residual.T

    return draw, float(truth)


@dataclass(frozen=True)
class Coverage:
    """The results of `repeats` draws of one family and size; all in units of ICR."""

    family: str
    n: int
    k: int
    d: int
    truth: float
    plugin: float  # means over the draws
    debiased: float
    centre: float
    deviation: float  # standard deviation of the centre
    standard_error: float
    coverage: float
    repeats: int

    @property
    def degrees_per_dimension(self) -> float:
        """nu / D."""
        return (self.n - 1) * (self.k - 1) / self.d


def measure_coverage(family: Family, n: int, k: int, d: int, repeats: int, seed: int = 0) -> Coverage:
    """Simulate `repeats` draws and compare the estimates and 95 % intervals with the truth."""
    rng = np.random.default_rng([seed, n, k, d, FAMILIES.index(family)])
    draw, truth = simulator(rng, family, n, k, d)
    estimates = []
    for _ in range(repeats):
        features = torch.from_numpy(draw())
        interval = icr_interval(features)
        nu = (n - 1) * (k - 1)
        # The plug-in value, from the debiased one.
        plugin = 1 / (((1 / interval.value - 1) + 1 / k) * nu / (nu - d - 1) - 1 / k + 1)
        inside = interval.low <= truth <= interval.high
        estimates.append((plugin, interval.value, interval.centre, interval.standard_error, float(inside)))
    plugins, values, centres, errors, inside_all = np.array(estimates).T
    return Coverage(
        family.name,
        n,
        k,
        d,
        truth,
        float(plugins.mean()),
        float(values.mean()),
        float(centres.mean()),
        float(centres.std(ddof=1)),
        float(errors.mean()),
        float(inside_all.mean()),
        repeats,
    )


def read_coverages(path: Path) -> list[Coverage]:
    """The rows of a table that `simulate_missing` wrote; none where there is no file."""
    if not path.exists():
        return []
    with path.open() as file:
        hints = get_type_hints(Coverage)
        return [Coverage(**{key: hints[key](value) for key, value in row.items()}) for row in csv.DictReader(file)]


def simulate_missing(path: Path, repeats: int) -> None:
    """Add every family at every size to a CSV table, one row after the other; rows with so many draws stay."""
    rows = [row for row in read_coverages(path) if row.repeats == repeats]
    simulated = {(row.family, row.n, row.k, row.d) for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    for family in FAMILIES:
        for n, k, d in SIZES:
            if (family.name, n, k, d) in simulated:
                continue
            rows.append(measure_coverage(family, n, k, d, repeats))
            part = path.with_name(f".{path.name}.part")
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, [field.name for field in fields(Coverage)], lineterminator="\n")
                writer.writeheader()
                writer.writerows(asdict(row) for row in rows)
            part.rename(path)
            print(f"simulated {family.name}, N = {n}, K = {k}, D = {d}: {rows[-1].coverage:.3f}", flush=True)

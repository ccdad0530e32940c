"""The cost of distances, neighbours and encoders, over the least work that they need and over the usual ways.

- `frechet_distance` against scipy's `sqrtm` of the covariances' product, and against torchmetrics' eigenvalues of it: from
  statistics of both sets, which all of them keep of a reference set, and from float64 embeddings, where covariances count too.
- `memorization_ratio` against the bare float32 matrix product of the two sets, which is the limit, and against
  `torch.cdist` with `topk`; the largest tensor that a search makes, against its budget.
- An encoder against the bare forward pass of its network on tensors that are ready.

Each pair is timed in turn in this process; the ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.results import keep
from mlflow_icr import frechet_distance, memorization_ratio
from mlflow_icr.extraction.encoders import load_encoder
from mlflow_icr.generation import gaussian_statistics
from mlflow_icr.generation.neighbours import BUDGET_BYTES


def timed(call: Callable[[], object]) -> tuple[float, object]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def pairs(
    name: str, ours: Callable[[], object], theirs: Callable[[], object], goal: str, repeats: int, result_name: str = ""
) -> None:
    times = [(timed(ours)[0], timed(theirs)[0]) for _ in range(repeats)]
    our_seconds, their_seconds = (statistics.median(side) for side in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    print(f"{name:64} ours {our_seconds:7.2f} s  theirs {their_seconds:7.2f} s  ratio {ratio:.3f} (goal: {goal})", flush=True)
    if result_name:
        keep(**{result_name: ratio})


Statistics = tuple[Tensor, Tensor]  # mean and covariance


def of_numpy(x: Tensor) -> Statistics:
    return x.mean(0), torch.from_numpy(np.cov(x, rowvar=False))


def of_torch(x: Tensor) -> Statistics:
    return x.mean(0), x.T.cov()


def scipys(x: Statistics, y: Statistics) -> float:
    root = scipy.linalg.sqrtm(x[1].numpy() @ y[1].numpy())
    return float((x[0] - y[0]).square().sum() + np.trace(x[1] + y[1] - 2 * root.real))


def torchmetrics_way(x: Statistics, y: Statistics) -> float:
    from torchmetrics.image.fid import _compute_fid

    return float(_compute_fid(*x, *y))


def frechet(n: int, dim: int, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64) * torch.linspace(1, 0.05, dim, dtype=torch.float64)
    x, y = (torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mix + shift for shift in (0.0, 0.1))
    a, b = gaussian_statistics(x), gaussian_statistics(y)
    p, q = of_torch(x), of_torch(y)
    values = {
        "ours, from embeddings": frechet_distance(x, y),
        "ours, from statistics": frechet_distance(a, b),
        "scipy": scipys(p, q),
        "torchmetrics": torchmetrics_way(p, q),
    }
    print(f"Frechet distance, N = {n}, D = {dim}:", ", ".join(f"{name} {value:.10g}" for name, value in values.items()))

    def from_statistics() -> float:
        return frechet_distance(a, b)

    def from_embeddings() -> float:
        return frechet_distance(x, y)

    pairs(
        "  statistics to value, scipy's sqrtm",
        from_statistics,
        lambda: scipys(p, q),
        "at most 0.1",
        repeats,
        "frechet_statistics_over_scipy",
    )
    pairs(
        "  statistics to value, torchmetrics",
        from_statistics,
        lambda: torchmetrics_way(p, q),
        "at most 0.33",
        repeats,
        "frechet_statistics_over_torchmetrics",
    )
    pairs(
        "  embeddings to value, scipy's sqrtm",
        from_embeddings,
        lambda: scipys(of_numpy(x), of_numpy(y)),
        "none",
        repeats,
        "frechet_embeddings_over_scipy",
    )
    pairs(
        "  embeddings to value, torchmetrics",
        from_embeddings,
        lambda: torchmetrics_way(of_torch(x), of_torch(y)),
        "none",
        repeats,
        "frechet_embeddings_over_torchmetrics",
    )


class Largest(TorchDispatchMode):
    """A context that records the largest storage made inside it."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = {z.untyped_storage().data_ptr() for z in inputs}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, Tensor) and part.untyped_storage().data_ptr() not in self.inputs:
                self.bytes = max(self.bytes, part.untyped_storage().nbytes())
        return result


def cdist_way(x: Tensor, y: Tensor) -> float:
    near = torch.cdist(x, y).topk(2, largest=False).values
    return float((near[:, 0] / near[:, 1] < 1 / 3).double().mean())


def neighbours(n: int, m: int, dim: int, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(rows, dim, generator=generator) for rows in (n, m))
    name = f"memorization_ratio, {n} x {m} of {dim} values"
    pairs(
        f"{name}, bare product",
        lambda: memorization_ratio(x, y),
        lambda: x @ y.T,
        "at most 1.3",
        repeats,
        "memorization_over_product",
    )
    pairs(
        f"{name}, cdist and topk",
        lambda: memorization_ratio(x, y),
        lambda: cdist_way(x, y),
        "at most 1",
        repeats,
        "memorization_over_cdist",
    )


def memory(n: int, m: int, dim: int) -> None:
    x, y = torch.rand(n, dim), torch.rand(m, dim)
    with Largest(x, y) as largest:
        memorization_ratio(x, y)
    share = largest.bytes / BUDGET_BYTES
    print(
        f"memorization_ratio, {n} x {m} of {dim} values: largest tensor {share:.2f} of the budget (goal: at most 1)", flush=True
    )
    keep(memorization_largest_tensor=share)


def encoding(repeats: int) -> None:
    encoder = load_encoder("efficientnet_lite0")
    images = torch.randint(256, (512, 3, 32, 32), dtype=torch.uint8)
    ready = [encoder._prepare(batch.float() / 255) for batch in images.split(encoder.batches.size)]

    @torch.no_grad()
    def bare() -> None:
        for batch in ready:
            encoder._network(batch)

    pairs(
        "efficientnet_lite0 on 512 images, bare forward passes",
        lambda: encoder(images),
        bare,
        "at most 1.1",
        repeats,
        "encoder_over_bare",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="sizes that take seconds")
    arguments = parser.parse_args()
    scale = 10 if arguments.small else 1
    encoding(arguments.repeats)
    neighbours(2000 // scale, 20_000 // scale, 3072, arguments.repeats)
    memory(10_000 // scale, 50_000 // scale, 3072)
    frechet(10_000 // scale, 2048 // scale, arguments.repeats)


if __name__ == "__main__":
    main()

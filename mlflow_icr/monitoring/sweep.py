"""ICR over noise levels and layers and, with labels, the accuracy of a linear probe: to choose where to measure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlflow_icr.extraction.denoisers import Denoiser, device_of, encoder_of
from mlflow_icr.extraction.fitting import FittingBatches
from mlflow_icr.extraction.keyed import keyed_generator
from mlflow_icr.extraction.taps import Tap, middle_layers
from mlflow_icr.extraction.views import as_unit_interval
from mlflow_icr.monitoring.companions import cross_validated
from mlflow_icr.monitoring.protocol import Protocol
from mlflow_icr.monitoring.reader import view_batches
from mlflow_icr.representation import ICRInterval, icr_interval, linear_probe_accuracy, paired_difference

# Those of Li et al. 2026, figure 2, for EDM.
SIGMAS = (0.01, 0.02, 0.06, 0.14, 0.3, 0.59, 1.09, 1.92, 3.26)


@dataclass(frozen=True)
class SweepPoint:
    """One layer at one sigma: debiased ICR with its 95 % interval, accuracy of a linear probe; None where `absent` says why.

    `rise` is how far ICR is above the layer's lowest, and `rise_low` the lower end of the 95 % interval of that difference,
    which is paired: images and views are the same at every sigma.
    """

    sigma: float
    layer: str
    dim: int
    icr: float | None
    low: float | None
    high: float | None
    accuracy: float | None
    absent: str = ""
    rise: float | None = None
    rise_low: float | None = None


@dataclass(frozen=True)
class NoiseSweep:
    """The points of a sweep, the best sigma of each layer, and the best layer."""

    points: tuple[SweepPoint, ...]
    num_images: int
    num_views: int

    @property
    def layers(self) -> list[str]:
        """The layers, in the order of the data."""
        return list(dict.fromkeys(p.layer for p in self.points))

    @property
    def sigmas(self) -> list[float]:
        """The noise levels, ascending."""
        return sorted({p.sigma for p in self.points})

    def of(self, layer: str) -> list[SweepPoint]:
        """The points of a layer by ascending sigma."""
        return sorted((p for p in self.points if p.layer == layer), key=lambda p: p.sigma)

    def _measured(self, layer: str) -> list[SweepPoint]:
        return [p for p in self.of(layer) if p.icr is not None]

    def sigma_star(self, layer: str) -> float | None:
        """The sigma with the lowest ICR of a layer; None where none was measured."""
        measured = self._measured(layer)
        return min(measured, key=lambda p: p.icr or 0.0).sigma if measured else None

    def most_accurate_sigma(self, layer: str) -> float | None:
        """The sigma with the highest probe accuracy of a layer; None without labels."""
        probed = [p for p in self.of(layer) if p.accuracy is not None]
        return max(probed, key=lambda p: p.accuracy or 0.0).sigma if probed else None

    def has_window(self, layer: str) -> bool:
        """Whether ICR over sigma is certainly U-shaped: at both ends its interval is above the lowest ICR."""
        measured = self._measured(layer)
        return len(measured) >= 3 and all(end.rise_low is not None and end.rise_low > 0 for end in (measured[0], measured[-1]))

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values, for JSON."""
        by_layer = {
            layer: {
                "sigma_star": self.sigma_star(layer),
                "most_accurate_sigma": self.most_accurate_sigma(layer),
                "has_window": self.has_window(layer),
            }
            for layer in self.layers
        }
        return {
            "best_layer": self.best_layer,
            "layers": by_layer,
            "num_images": self.num_images,
            "num_views": self.num_views,
            "points": [asdict(point) for point in self.points],
        }

    @property
    def best_layer(self) -> str | None:
        """The layer whose ICR gets lowest, at its own best sigma; None where nothing was measured."""
        measured = [p for p in self.points if p.icr is not None]
        return min(measured, key=lambda p: p.icr or 0.0).layer if measured else None


def _views_needed(dims: Sequence[int], num_images: int, protocol: Protocol) -> int:
    resolved = protocol.resolve(images=num_images, dim=max(dims)).num_views
    assert resolved is not None
    return resolved


def _noised(images: Tensor, start: int, sigma: float, seed: int) -> Tensor:
    """Clean images or latents (B, C, H, W) plus noise that is keyed by their place in the set."""
    noise = np.stack(
        [
            keyed_generator("probe", seed, start + i).standard_normal(tuple(images.shape[1:]), dtype=np.float32)
            for i in range(len(images))
        ]
    )
    return images + sigma * torch.from_numpy(noise).to(images.device)


class _Sweeper:
    """Reads all layers in one pass of each batch."""

    def __init__(self, denoiser: Denoiser, images: Tensor, layers: Sequence[str], protocol: Protocol, batch_size: int) -> None:
        self.denoiser, self.images, self.layers, self.batch_size = denoiser, images, list(layers), batch_size
        self.device, self.encode = device_of(denoiser), encoder_of(denoiser)
        x = self._clean(images[:1])
        with Tap(denoiser.network, *self.layers) as tap:
            self.dims = [f.shape[1] for f in tap.each(lambda: denoiser(x, 1.0))]
            self.names = tap.layers
        self.num_views = _views_needed(self.dims, len(images), protocol)
        self.protocol = protocol

    def _clean(self, images: Tensor) -> Tensor:
        clean = as_unit_interval(images).to(self.device) * 2 - 1
        return clean if self.encode is None else self.encode(clean)

    def views(self, sigma: float) -> list[Tensor]:
        """Features (N, K, D) of each layer on views."""
        indices = range(len(self.images))
        p, size = self.protocol, FittingBatches(self.batch_size)
        batches = view_batches(self.images, indices, self.num_views, sigma, p, size, self.device, self.encode)
        features = self._read((views.flatten(0, 1) for views in batches), sigma)
        return [f.view(len(self.images), self.num_views, -1) for f in features]

    def plain(self, images: Tensor, sigma: float, seed: int) -> list[Tensor]:
        """Features (N, D) of each layer on noised images that are not augmented."""
        step = self.batch_size
        batches = (_noised(self._clean(images[i : i + step]), i, sigma, seed) for i in range(0, len(images), step))
        return self._read(batches, sigma)

    def _read(self, batches: Iterator[Tensor], sigma: float) -> list[Tensor]:
        parts: list[list[Tensor]] = [[] for _ in self.layers]
        with Tap(self.denoiser.network, *self.layers) as tap:
            for x in batches:
                for layer_parts, features in zip(parts, tap.each(partial(self.denoiser, x, sigma)), strict=True):
                    layer_parts.append(features)
        return [torch.cat(layer_parts) for layer_parts in parts]


def _with_rises(points: Sequence[SweepPoint], intervals: Mapping[tuple[float, str], ICRInterval]) -> list[SweepPoint]:
    """The points; those with an interval are compared with the lowest ICR of their layer."""
    lowest: dict[str, ICRInterval] = {}
    for (_, layer), candidate in intervals.items():
        if layer not in lowest or candidate.value < lowest[layer].value:
            lowest[layer] = candidate
    compared = []
    for point in points:
        interval, base = intervals.get((point.sigma, point.layer)), lowest.get(point.layer)
        if interval is not None and base is not None:
            rise = interval.value - base.value
            point = replace(point, rise=rise, rise_low=paired_difference(base.influence, interval.influence, rise)[0])
        compared.append(point)
    return compared


def _accuracies(sweeper: _Sweeper, sigma: float, labelled: LabelledImages) -> list[float]:
    """Accuracy of a linear probe on each layer's features of noised, unaugmented images."""
    train = sweeper.plain(labelled.images, sigma, 0)
    if labelled.test_images is None or labelled.test_labels is None:
        return [cross_validated(f.cpu(), labelled.labels, linear_probe_accuracy) for f in train]
    test = sweeper.plain(labelled.test_images, sigma, 1)
    return [linear_probe_accuracy(a, labelled.labels, b, labelled.test_labels) for a, b in zip(train, test, strict=True)]


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images (N, C, H, W) and labels (N,) for a linear probe, and a test set; without one the probe is cross-validated.

    Raises ValueError for sets that do not fit.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor | None = None
    test_labels: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.test_images is None) != (self.test_labels is None):
            raise ValueError("test_images and test_labels go together; expected both or none")
        tests = () if self.test_images is None else (("test_labels", self.test_labels, self.test_images),)
        for name, labels, images in (("labels", self.labels, self.images), *tests):
            assert labels is not None
            if len(labels) != len(images):
                raise ValueError(f"{name} has {len(labels)} entries for {len(images)} images; expected one for each")


def sweep_noise(
    denoiser: Denoiser,
    images: Tensor,
    *,
    sigmas: Sequence[float] = SIGMAS,
    layers: Sequence[str] = (),
    protocol: Protocol | None = None,
    labelled: LabelledImages | None = None,
    batch_size: int = 512,
) -> NoiseSweep:
    """ICR, with intervals, of each layer at each sigma, from one forward pass of each noised batch for all layers.

    `images` are (N, C, H, W), uint8 or floats in [0, 1]; layers default to all blocks of the network. `labelled` ones add the
    accuracy of a linear probe on features of noised, unaugmented images, which need not be those of ICR: for a model that was
    trained on few, more labelled ones say more. Only views, augmentation and seed of `protocol` are used. Raises ValueError for
    sigmas, layers or images that do not fit. Source: Li et al. 2026, figures 2, 9 and 14.
    """
    if not sigmas or not all(0 < s < math.inf for s in sigmas):
        raise ValueError(f"sigmas is {tuple(sigmas)}; expected positive finite numbers")
    layers = list(layers) or middle_layers(denoiser.network)
    if not layers:
        raise ValueError(f"layers is empty, and {type(denoiser.network).__name__} has no blocks that are known; name some")
    sweeper = _Sweeper(denoiser, images, layers, protocol or Protocol(), batch_size)
    points: list[SweepPoint] = []
    intervals: dict[tuple[float, str], ICRInterval] = {}
    for sigma in sorted(set(sigmas)):
        accuracies = [None] * len(layers) if labelled is None else _accuracies(sweeper, sigma, labelled)
        for name, features, accuracy in zip(sweeper.names, sweeper.views(sigma), accuracies, strict=True):
            try:
                interval = intervals[sigma, name] = icr_interval(features)
                points.append(SweepPoint(sigma, name, features.shape[2], interval.value, interval.low, interval.high, accuracy))
            except ValueError as error:
                points.append(SweepPoint(sigma, name, features.shape[2], None, None, None, accuracy, str(error)))
    return NoiseSweep(tuple(_with_rises(points, intervals)), len(images), sweeper.num_views)

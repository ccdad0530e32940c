"""Companions of ICR that a monitor logs on request, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mlflow_icr.extraction.denoisers import Denoiser
from mlflow_icr.extraction.keyed import keyed_generator
from mlflow_icr.extraction.taps import resolve_layer, unwrap
from mlflow_icr.monitoring.errors import ErrorReader
from mlflow_icr.representation import companions, probes

FOLDS = 5  # of the cross-validation of labelled probes


def cross_validated(features: Tensor, labels: Tensor, score: Callable[[Tensor, Tensor, Tensor, Tensor], float]) -> float:
    """Mean score of `score(train, labels, test, labels)` over fixed folds of the images (N, D)."""
    order = torch.from_numpy(keyed_generator("folds", 0).permutation(len(features)))
    scores = []
    for fold in range(FOLDS):
        test = order[fold::FOLDS]
        train = order[torch.isin(order, test, invert=True)]
        scores.append(score(features[train], labels[train], features[test], labels[test]))
    return sum(scores) / FOLDS


def _first_view(features: Tensor) -> Tensor:
    return features[:, 0].cpu()


LABEL_FREE: dict[str, Callable[[Tensor], float]] = {
    "alignment": companions.alignment,
    "uniformity": companions.uniformity,
    "rankme": companions.rankme,
    "effective_rank": companions.effective_rank,
    "lidar": companions.lidar,
    "nc1_images": companions.variability_ratio,
    "feature_deviation": companions.feature_deviation,
}
LABELLED: dict[str, Callable[[Tensor, Tensor], float]] = {
    "nc1_classes": companions.variability_ratio,
    "class_separation": companions.class_separation,
    "silhouette": lambda x, y: probes.silhouette(_first_view(x), y),
    "linear_probe_accuracy": lambda x, y: cross_validated(_first_view(x), y, probes.linear_probe_accuracy),
    "knn_accuracy": lambda x, y: cross_validated(_first_view(x), y, probes.knn_accuracy),
}
NETWORK = ("stable_rank", "sima")  # computed from weights or from whole forward passes, not from features
NAMES = (*LABEL_FREE, *NETWORK, *LABELLED)


def check_companions(names: Sequence[str], labelled: bool) -> None:
    """Raise ValueError for a name that is unknown, or that needs labels where there are none."""
    for name in names:
        if name not in NAMES:
            raise ValueError(f"companions is {name!r}; expected some of {', '.join(NAMES)}")
        if name in LABELLED and not labelled:
            label_free = ", ".join((*LABEL_FREE, *NETWORK))
            raise ValueError(f"companions is {name!r}, which needs labels; without them expected {label_free}")


def companion_values(names: Sequence[str], features: Tensor, labels: Tensor | None) -> tuple[dict[str, float], dict[str, str]]:
    """The named companions of features (N, K, D), with or without labels (N,), and reasons for those that fail."""
    values, absent = {}, {}
    for name in (name for name in names if name not in NETWORK):
        try:
            if name in LABEL_FREE:
                values[name] = LABEL_FREE[name](features)
            else:
                assert labels is not None
                values[name] = LABELLED[name](features, labels)
        except ValueError as error:  # most often, one class in the probe
            absent[name] = str(error)
    return values, absent


def network_companions(
    names: Sequence[str], denoiser: Denoiser, sigma: float, errors: ErrorReader
) -> tuple[dict[str, float], dict[str, str]]:
    """The named companions that are not computed from features, and reasons for those that fail.

    `stable_rank` measures the bottleneck's weights, `sima` denoising at noise sigma.
    """
    values, absent = {}, {}
    if "stable_rank" in names:
        network = unwrap(denoiser.network)
        try:
            bottleneck = network.get_submodule(resolve_layer(network, "middle"))
            values["stable_rank"] = companions.stable_rank([p for p in bottleneck.parameters() if p.ndim >= 2])
        except ValueError as error:  # a network without a known middle
            absent["stable_rank"] = str(error)
    if "sima" in names:
        values["sima"] = errors.sima(denoiser, sigma)
    return values, absent

"""Power-function averages of weights, and the reconstruction of an average of any width from a few snapshots.

An average of exponent gamma at time t weighs the weights of time s by p(s) = (gamma + 1) s^gamma / t^(gamma + 1). Its relative
width `std`, the standard deviation of p over t, is the parameter that users choose. Snapshots of two averages, taken along a
training, are enough to approximate the average of any width at any time up to the last of them. Time is in images seen.
Source: Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

SNAPSHOTS = "power_averages.safetensors"  # in a checkpoint's folder
WIDEST = 12**-0.5  # the width of exponent 0, which weighs all times equally
WEIGHTS = "diffusion_pytorch_model.safetensors"


def check_std(name: str, std: float) -> None:
    """Raise ValueError unless a relative width is one of a power function."""
    if not 0 < std < WIDEST:
        raise ValueError(f"{name} is {std:g}; expected a relative width in (0, {WIDEST:.4f})")


def exponent_of(std: float) -> float:
    """The exponent gamma of a relative width: (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = std^2. Raises ValueError."""
    check_std("std", std)
    roots = np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2])
    return float(roots.real.max())


def width_of(exponent: float) -> float:
    """The relative width of an average: the inverse of `exponent_of`."""
    return float(((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3))) ** 0.5)


def power_beta(std: float, images_seen: int, batch_size: int) -> float:
    """The weight of the old average at a step to images_seen: (1 - batch / images seen)^(gamma + 1)."""
    return float((1 - batch_size / images_seen) ** (exponent_of(std) + 1))


@dataclass(frozen=True)
class Profile:
    """An average: its relative width, and the images seen at its end."""

    std: float
    images_seen: float


def inner_products(first: Sequence[Profile], second: Sequence[Profile]) -> np.ndarray:
    """Integrals of p_a(s) p_b(s) over s, (len(first), len(second)), per image seen."""
    ga, gb = (np.array([exponent_of(p.std) for p in profiles]) for profiles in (first, second))
    ta, tb = (np.array([p.images_seen for p in profiles], dtype=np.float64) for profiles in (first, second))
    ga, ta = ga[:, None], ta[:, None]
    low, high = np.minimum(ta, tb), np.maximum(ta, tb)
    of_high = np.where(ta < tb, gb, ga)  # the exponent of the later profile; powers of the earlier one cancel
    return np.asarray((ga + 1) * (gb + 1) / (ga + gb + 1) * (low / high) ** of_high / high)


def coefficients(snapshots: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """The weight of each snapshot in the wanted average, (len(snapshots),), and the relative L2 error of its profile.

    Raises ValueError for no snapshots.
    """
    if not snapshots:
        raise ValueError("there are no snapshots; expected some of at least one average")
    gram = inner_products(snapshots, snapshots)
    right = inner_products(snapshots, [wanted])[:, 0]
    # Close times give nearly equal profiles; the least-norm solution keeps their coefficients small.
    weights, *_ = np.linalg.lstsq(gram, right, rcond=1e-14)
    norm = inner_products([wanted], [wanted])[0, 0]
    squared_error = norm + weights @ gram @ weights - 2 * weights @ right
    return weights, float(np.sqrt(max(squared_error, 0.0) / norm))


def snapshots_of(checkpoints: Path) -> dict[Profile, Path]:
    """The averages in a run's checkpoints, oldest first. Raises ValueError where there are none."""
    folder = checkpoints / "checkpoints" if (checkpoints / "checkpoints").is_dir() else checkpoints
    snapshots: dict[Profile, Path] = {}
    for path in sorted(folder.glob(f"[0-9]*/{SNAPSHOTS}")):
        with safe_open(path, framework="pt") as file:
            for std in sorted({float(key.split("/", 1)[0]) for key in file.keys()}):  # noqa: SIM118 - it is no mapping
                if int(path.parent.name):  # before the first step there is nothing to average
                    snapshots[Profile(std, int(path.parent.name))] = path
    if not snapshots:
        raise ValueError(
            f"checkpoints is {str(checkpoints)!r}, which holds no {SNAPSHOTS}; expected those of a run with --power-ema-stds"
        )
    return snapshots


def reconstructed(snapshots: dict[Profile, Path], wanted: Profile) -> tuple[dict[str, dict[str, Tensor]], float]:
    """Tensors of the wanted average by component and name, float32, and the relative error of its profile.

    Raises ValueError for a time after the last snapshot.
    """
    last = max(profile.images_seen for profile in snapshots)
    if not 0 < wanted.images_seen <= last:
        raise ValueError(f"images_seen is {wanted.images_seen:g}; expected at most {last:g}, the last snapshot")
    shares, error = coefficients(list(snapshots), wanted)
    sums: dict[str, dict[str, Tensor]] = {}
    for share, (profile, path) in zip(shares, snapshots.items(), strict=True):
        prefix = f"{profile.std:g}/"
        with safe_open(path, framework="pt") as file:
            for key in (key for key in file.keys() if key.startswith(prefix)):  # noqa: SIM118
                component, name = key.removeprefix(prefix).split("/", 1)
                part = file.get_tensor(key).double() * share
                tensors = sums.setdefault(component, {})
                tensors[name] = tensors[name] + part if name in tensors else part
    plain = {component: {k: v.to(torch.float32) for k, v in tensors.items()} for component, tensors in sums.items()}
    return plain, error

"""The protocol of a measurement. Two values are comparable when their protocols have the same digest."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace

from mlflow_icr.extraction.error_views import AUGMENTATIONS, ERROR_VIEWS
from mlflow_icr.extraction.views import AUGMENTATION_CONSTANTS, AUGMENTATION_LEVELS

NORMALISATIONS = ("l2", "none")
SHRINKAGES = ("none", "ledoit-wolf", "oas")

# Views are added until nu = (N-1)(K-1) reaches this many times D: there the plug-in's inverse covariance is a third too
# large, nu / (nu - D - 1) (`docs/built/formulas.md`); with fewer that factor, and the scatter with it, grows fast.
DEGREES_PER_DIMENSION = 4
# The default takes at most this many images: an interval narrows only with the square root of their number.
MOST_AUTOMATIC_IMAGES = 1024
# The default takes at most this many views: a measurement costs one forward pass a view.
MOST_AUTOMATIC_VIEWS = 64


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{field} is {value!r}; expected {allowed}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Protocol:
    """Which layer is read, in how many views of how many images, at which noise; refuses impossible values.

    `sigmas` are noise standard deviations (a single number is taken too): the first is logged under `repr/`, others under
    `repr_sigma<value>/`. `num_images` None means all images given, up to 1024; `num_views` None means as many as the layer's
    width needs. `normalisation` is that of the features in traces and energies. Where there are too few views, `projection`
    reads that many principal directions of the features (fitted once), or `shrinkage` (ledoit-wolf, oas) conditions Sigma_xi.
    `training_augmentations` names what training does to its images (flip, shift); error views leave these out. `dtype` is
    the type of the network's weights and `condition` what it is conditioned on; a monitor fills in both. Raises ValueError
    naming field, value and what is allowed.
    """

    layer: str = "decoder"
    sigmas: tuple[float, ...] = (0.29,)
    augmentation_level: int = 3
    num_images: int | None = None
    num_views: int | None = None
    seed: int = 0
    ridge: float = 0.0
    normalisation: str = "l2"
    projection: int | None = None
    shrinkage: str = "none"
    training_augmentations: tuple[str, ...] = ()
    dtype: str = ""
    condition: str = ""

    def __post_init__(self) -> None:
        sigmas = self.sigmas
        if isinstance(sigmas, (int, float)):
            sigmas = (sigmas,)
        _require(isinstance(self.layer, str) and bool(self.layer), "layer", self.layer, "a module path or an alias")
        _require(
            isinstance(sigmas, (tuple, list))
            and len(sigmas) > 0
            and all(isinstance(s, (int, float)) and 0 < s < math.inf for s in sigmas),
            "sigmas",
            self.sigmas,
            "positive finite numbers",
        )
        object.__setattr__(self, "sigmas", tuple(float(s) for s in sigmas))
        _require(len(set(self.sigmas)) == len(self.sigmas), "sigmas", self.sigmas, "different numbers")
        levels = ", ".join(map(str, AUGMENTATION_LEVELS))
        _require(
            _whole(self.augmentation_level) and self.augmentation_level in AUGMENTATION_LEVELS,
            "augmentation_level",
            self.augmentation_level,
            f"one of {levels}",
        )
        n, k = self.num_images, self.num_views
        _require(n is None or (_whole(n) and n >= 2), "num_images", n, "a whole number >= 2, or None for all")
        _require(k is None or (_whole(k) and k >= 2), "num_views", k, "a whole number >= 2, or None for automatic")
        _require(_whole(self.seed) and self.seed >= 0, "seed", self.seed, "a whole number >= 0")
        _require(isinstance(self.ridge, (int, float)) and 0 <= self.ridge < math.inf, "ridge", self.ridge, "a number >= 0")
        _require(
            self.normalisation in NORMALISATIONS, "normalisation", self.normalisation, f"one of {', '.join(NORMALISATIONS)}"
        )
        p = self.projection
        _require(p is None or (_whole(p) and p >= 1), "projection", p, "a whole number >= 1, or None")
        _require(self.shrinkage in SHRINKAGES, "shrinkage", self.shrinkage, f"one of {', '.join(SHRINKAGES)}")
        t = self.training_augmentations
        _require(
            isinstance(t, (tuple, list)) and set(t) <= set(AUGMENTATIONS),
            "training_augmentations",
            t,
            f"some of {', '.join(AUGMENTATIONS)}",
        )
        object.__setattr__(self, "training_augmentations", tuple(sorted(set(t))))
        _require(self.ridge == 0 or self.shrinkage == "none", "ridge", self.ridge, "0 where shrinkage is given")

    def resolve(self, *, images: int, dim: int) -> Protocol:
        """This protocol with its numbers of images and views fixed, for `images` images and a layer of width `dim`.

        Raises ValueError when there are fewer images than the protocol names.
        """
        n = min(images, MOST_AUTOMATIC_IMAGES) if self.num_images is None else self.num_images
        _require(2 <= n <= images, "num_images", n, f"2 to {images}, the number of images given")
        _require(self.projection is None or self.projection <= dim, "projection", self.projection, f"at most {dim}, the width")
        width = self.projection or dim
        k = self.num_views or min(MOST_AUTOMATIC_VIEWS, max(2, 1 + math.ceil(DEGREES_PER_DIMENSION * width / (n - 1))))
        return replace(self, num_images=n, num_views=k)

    def degrees_per_dimension(self, dim: int) -> float:
        """nu / D = (N-1)(K-1) / D of a resolved protocol for a layer of width `dim`, or for its projection."""
        assert self.num_images is not None
        assert self.num_views is not None
        return (self.num_images - 1) * (self.num_views - 1) / (self.projection or dim)

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that are the same exactly for equal protocols, and for equal strengths of augmentation."""
        content = asdict(self) | {"augmentation": AUGMENTATION_CONSTANTS, "error_views": ERROR_VIEWS}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

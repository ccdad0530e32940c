"""The monitor: from a denoiser and its training images to the representation's values."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mlflow_icr.extraction.denoisers import Denoiser, device_of
from mlflow_icr.extraction.taps import Tap
from mlflow_icr.extraction.views import as_unit_interval, make_views
from mlflow_icr.monitoring.protocol import Protocol
from mlflow_icr.monitoring.ranks import sum_over_ranks, world
from mlflow_icr.monitoring.report import Report
from mlflow_icr.representation import InvariantSpectrum, ViewMoments

RATIOS = ("icr", "icr_debiased", "indefinite_fraction")
ENERGIES = ("trace_invariant", "trace_residual", "fisher_residual_energy", "fisher_invariant_energy")
GROWTH = "fisher_residual_growth"


class ICRMonitor:
    """Measures the Invariant Contamination Ratio and its energies of a denoiser on its own training images.

    `denoiser` is read (give the EMA weights: they are what one samples from), and `raw` too where given, under
    `repr_raw/`. `images` are (N, C, H, W), uint8 or floats in [0, 1]; the protocol's first num_images of them are used. Views
    are made once and kept while they take no more than `cache_bytes`. Under torch.distributed every rank calls `measure`,
    takes its share of the images, and gets the same report. Raises ValueError for images or a protocol that do not fit.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        images: Tensor,
        protocol: Protocol | None = None,
        *,
        raw: Denoiser | None = None,
        batch_size: int = 512,
        cache_bytes: int = 512 * 2**20,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1 view")
        self.denoiser = denoiser
        self.raw = raw
        self.batch_size = batch_size
        self.cache_bytes = cache_bytes
        as_unit_interval(images)  # refuses what cannot be viewed now, not at the first measurement
        protocol = protocol or Protocol()
        self.dim = self._width(images[:1], protocol)
        self.protocol = protocol.resolve(images=len(images), dim=self.dim)
        self.images = images[: self.protocol.num_images]
        self._cache: dict[float, list[Tensor]] = {}
        # What fisher_residual_growth is relative to, by section: the first measurement after training has begun, since the
        # covariance of an untrained network's features says nothing about what was learned.
        self._references: dict[str, InvariantSpectrum] = {}

    def _width(self, image: Tensor, protocol: Protocol) -> int:
        """D of the tapped layer, from one image."""
        sigma = protocol.sigmas[0]
        view = make_views(image, [0], num_views=1, sigma=sigma, seed=0, device=device_of(self.denoiser))[0]
        with Tap(self.denoiser.network, protocol.layer) as tap:
            return int(tap(lambda: self.denoiser(view, sigma)).shape[1])

    def _views(self, sigma: float, device: torch.device) -> Iterator[Tensor]:
        """This rank's views in batches (B, K, C, H, W), the same at every call."""
        if sigma in self._cache:
            yield from self._cache[sigma]
            return
        rank, ranks = world()
        p, k = self.protocol, self.protocol.num_views
        assert k is not None
        mine = list(range(rank, len(self.images), ranks))
        kept: list[Tensor] | None = []
        total = 4 * k * self.images[0].numel() * len(mine) * len(p.sigmas)
        if total > self.cache_bytes:
            kept = None
        step = max(1, self.batch_size // k)
        for start in range(0, len(mine), step):
            indices = mine[start : start + step]
            views = make_views(
                self.images[indices],
                indices,
                num_views=k,
                sigma=sigma,
                seed=p.seed,
                level=p.augmentation_level,
                device=device,
            )
            if kept is not None:
                kept.append(views)
            yield views
        if kept is not None:
            self._cache[sigma] = kept

    def _moments(self, denoiser: Denoiser, sigma: float) -> tuple[ViewMoments, ViewMoments]:
        """Moments of the features as they are, and of the normalised ones. Raises ValueError when some are not finite."""
        k = self.protocol.num_views
        assert k is not None
        plain, scaled, broken = ViewMoments(k, self.dim), ViewMoments(k, self.dim), 0
        with Tap(denoiser.network, self.protocol.layer) as tap:
            for views in self._views(sigma, device_of(denoiser)):
                x = views.flatten(0, 1)
                features = tap(partial(denoiser, x, sigma)).view(len(views), k, -1)  # (B, K, D)
                finite = features.isfinite().flatten(1).all(1)
                broken += int((~finite).sum())
                features = features[finite]
                plain.update(features)
                scaled.update(normalize(features, dim=-1) if self.protocol.normalisation == "l2" else features)
        # All ranks find out together: one that raised alone would leave the others waiting for its moments.
        broken = sum_over_ranks(broken, device_of(denoiser))
        if broken:
            raise ValueError(f"features hold NaN or Inf in {broken} of {len(self.images)} images")
        return plain.all_reduce(), scaled.all_reduce()

    def _section(self, section: str, denoiser: Denoiser, sigma: float, step: int) -> tuple[dict[str, float], dict[str, str]]:
        values: dict[str, float] = {}
        absent: dict[str, str] = {}
        try:
            plain, scaled = self._moments(denoiser, sigma)
        except ValueError as error:  # features that are not finite: training has diverged, and goes on if it wants to
            return {}, {f"{section}/{name}": str(error) for name in (*RATIOS, *ENERGIES, GROWTH)}
        try:
            spectrum = plain.spectrum(self.protocol.ridge)
            values[f"{section}/icr"] = spectrum.icr
            values[f"{section}/indefinite_fraction"] = spectrum.indefinite_fraction
            if spectrum.icr_debiased is not None:
                values[f"{section}/icr_debiased"] = spectrum.icr_debiased
            absent.update({f"{section}/{name}": why for name, why in spectrum.unavailable.items()})
        except ValueError as error:
            absent.update({f"{section}/{name}": str(error) for name in RATIOS})
        try:
            energies = scaled.spectrum(self.protocol.ridge)
            values.update({f"{section}/{name}": getattr(energies, name) for name in ENERGIES})
            if step > 0:
                reference = self._references.setdefault(section, energies)
                values[f"{section}/{GROWTH}"] = energies.fisher_residual_growth(reference)
        except ValueError as error:
            absent.update({f"{section}/{name}": str(error) for name in (*ENERGIES, GROWTH)})
        return values, absent

    def measure(self, step: int) -> Report:
        """The report at `step` images seen; weights, training flags and random number generators stay as they are."""
        started = time.perf_counter()
        values: dict[str, float] = {}
        absent: dict[str, str] = {}
        for place, sigma in enumerate(self.protocol.sigmas):
            suffix = "" if place == 0 else f"_sigma{sigma:g}"
            for section, denoiser in (("repr", self.denoiser), ("repr_raw", self.raw)):
                if denoiser is not None:
                    found, missing = self._section(section + suffix, denoiser, sigma, step)
                    values.update(found)
                    absent.update(missing)
        values["perf/measure_seconds"] = time.perf_counter() - started
        return Report(step, values, absent=absent, protocol_digest=self.protocol.digest)

    def state_dict(self) -> dict[str, Tensor]:
        """The reference covariances, (D, D) each, so that a resumed run's growth goes on from the same reference."""
        return {section: spectrum.sigma_residual.cpu() for section, spectrum in self._references.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the references of an earlier run of this protocol; the inverse of `state_dict`."""
        p = self.protocol
        assert p.num_images is not None
        assert p.num_views is not None
        self._references = {
            section: InvariantSpectrum(torch.zeros_like(sigma), sigma, p.num_images, p.num_views, p.ridge)
            for section, sigma in state.items()
        }

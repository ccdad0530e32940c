"""A section of the report: all values from the features of one network at one sigma, and their reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mlflow_icr.monitoring.companions import companion_values
from mlflow_icr.monitoring.protocol import Protocol
from mlflow_icr.monitoring.ranks import gather_rows, world
from mlflow_icr.monitoring.shrinkage import shrunk
from mlflow_icr.representation import (
    InvariantSpectrum,
    ViewMoments,
    as_double,
    interval_from_terms,
    leave_one_out_terms,
    paired_difference,
    principal_directions,
)

ROWS = 256  # images whose features are made float64 at a time
RATIOS = ("icr", "icr_debiased", "indefinite_fraction")
INTERVAL = ("icr_low", "icr_high", "icr_rise", "icr_rise_low", "icr_rise_high")
ENERGIES = ("trace_invariant", "trace_residual", "fisher_residual_energy", "fisher_invariant_energy")
GROWTH = "fisher_residual_growth"
ALL = (*RATIOS, *INTERVAL, *ENERGIES, GROWTH)


@dataclass
class SectionResult:
    """The result of a section, by key: values, reasons for absences, one number for each image, and data for histograms."""

    values: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    distributions: dict[str, np.ndarray] = field(default_factory=dict)


def growth_across(reference: Tensor, now: Tensor, ridge: float = 0.0) -> float:
    """How much residual energy has grown in the reference's Fisher basis, from Sigma_xi (2, D, D) of two halves of the images.

    The mean over both ways of tr((Sigma_xi(half, reference) + ridge I)^-1 Sigma_xi(other half, now)) / D, over the same at the
    reference. Raises ValueError for a half that is singular, or halves of another dimension.
    """
    if reference.shape != now.shape:
        raise ValueError(f"the reference has shape {tuple(reference.shape)}, this measurement {tuple(now.shape)}")
    eye = ridge * torch.eye(now.shape[1], dtype=torch.float64)
    factors, info = torch.linalg.cholesky_ex(reference + eye)
    if bool(info.any()):
        raise ValueError("Sigma_xi is singular")
    then, later = (torch.cholesky_solve(other.flip(0), factors).diagonal(dim1=1, dim2=2).sum() for other in (reference, now))
    return float(later / then)


class Section:
    """The values under one prefix, such as `repr`, and the earlier measurements that growth and rise are relative to."""

    def __init__(
        self, name: str, protocol: Protocol, companions: Sequence[str], labels: Tensor | None, trained_before: bool = False
    ) -> None:
        self.name, self.protocol, self.companions, self.labels = name, protocol, companions, labels
        self.origin = 0 if trained_before else 1  # the first step whose features show what was learned
        # All three come from measurements from the origin on.
        self._basis: Tensor | None = None  # (D, projection), fitted at the first of them
        self._reference: Tensor | None = None  # Sigma_xi of its images with even and with odd places, (2, D, D)
        self._lowest: tuple[float, Tensor] | None = None  # the lowest debiased ICR and its influences (N,)

    def read(self, features: Tensor, step: int) -> SectionResult:
        """All values from this rank's features (N of this rank, K, D) at `step`; the same on all ranks."""
        result = SectionResult()
        unprojected = features
        if self.protocol.projection is not None:
            if step < self.origin:
                why = "the projection is fitted at the first measurement after training has begun"
                result.absent.update(self._keyed(dict.fromkeys((*RATIOS, *INTERVAL, *ENERGIES, GROWTH), why)))
                self._read_companions(unprojected, result)
                return result
            basis = self._projection(features)
            features = torch.cat([as_double(part).to(basis) @ basis for part in features.split(ROWS)])
        scaled = normalize(features, dim=-1) if self.protocol.normalisation == "l2" else features
        self._read_ratios(features, step, result)
        self._read_energies(scaled, step, result)
        self._read_companions(unprojected, result)
        return result

    def _keyed(self, values: dict[str, str]) -> dict[str, str]:
        return {f"{self.name}/{key}": value for key, value in values.items()}

    def _gather(self, rows: Tensor) -> Tensor:
        assert self.protocol.num_images is not None
        return gather_rows(rows, self.protocol.num_images)

    def _projection(self, features: Tensor) -> Tensor:
        if self._basis is None:
            assert self.protocol.projection is not None
            self._basis = principal_directions(self._moments(features), self.protocol.projection)
        return as_double(self._basis).to("cpu" if features.device.type == "mps" else features.device)

    @staticmethod
    def _moments(features: Tensor) -> ViewMoments:
        return ViewMoments(features.shape[1], features.shape[2]).update(features).all_reduce()

    def _spectrum(self, moments: ViewMoments, features: Tensor) -> InvariantSpectrum:
        if self.protocol.shrinkage == "none":
            return moments.spectrum(self.protocol.ridge)
        residuals = self._gather(moments.centred(features)[1])
        return shrunk(moments, residuals, self.protocol.shrinkage)

    def _read_ratios(self, features: Tensor, step: int, result: SectionResult) -> None:
        moments = self._moments(features)
        try:
            spectrum = self._spectrum(moments, features)
        except ValueError as error:
            result.absent.update(self._keyed(dict.fromkeys((*RATIOS, *INTERVAL), str(error))))
            return
        result.values[f"{self.name}/icr"] = spectrum.icr
        result.values[f"{self.name}/indefinite_fraction"] = spectrum.indefinite_fraction
        result.distributions[f"{self.name}/eigenvalues"] = spectrum.eigenvalues.cpu().numpy()
        if spectrum.icr_debiased is None:
            result.absent.update(self._keyed(dict.fromkeys(("icr_debiased", *INTERVAL), spectrum.unavailable["icr_debiased"])))
            return
        result.values[f"{self.name}/icr_debiased"] = spectrum.icr_debiased
        try:
            terms = self._gather(leave_one_out_terms(moments, features))
        except ValueError as error:
            result.absent.update(self._keyed(dict.fromkeys(INTERVAL, str(error))))
            return
        interval = interval_from_terms(spectrum, terms)
        values = {"icr_low": interval.low, "icr_high": interval.high}
        result.arrays[f"{self.name}/influence"] = interval.influence.float().cpu().numpy()
        if step >= self.origin:
            influence = interval.influence.cpu()
            if self._lowest is None or spectrum.icr_debiased < self._lowest[0]:
                self._lowest = spectrum.icr_debiased, influence
            rise = spectrum.icr_debiased - self._lowest[0]
            low, high = paired_difference(self._lowest[1], influence, rise)
            values |= {"icr_rise": rise, "icr_rise_low": low, "icr_rise_high": high}
        result.values.update({f"{self.name}/{key}": value for key, value in values.items()})

    def _read_energies(self, scaled: Tensor, step: int, result: SectionResult) -> None:
        moments = self._moments(scaled)
        squares = [moments.centred(part)[1].square().sum((1, 2)) for part in scaled.split(ROWS)]
        residuals = self._gather(torch.cat(squares))
        if float(residuals.sum()) > 0:
            result.arrays[f"{self.name}/residual_share"] = (residuals / residuals.sum()).float().cpu().numpy()
        try:
            energies = self._spectrum(moments, scaled)
        except ValueError as error:
            result.absent.update(self._keyed(dict.fromkeys((*ENERGIES, GROWTH), str(error))))
            return
        result.values.update({f"{self.name}/{key}": getattr(energies, key) for key in ENERGIES})
        if step >= self.origin:
            self._read_growth(scaled, result)

    def _read_growth(self, scaled: Tensor, result: SectionResult) -> None:
        """Growth since the first measurement, each half of the images by the other half's inverse.

        An image's own inverse is not independent of its residuals; that of the other half is. So growth is 1 on average while
        nothing changes, and exactly 1 at the reference.
        """
        rank, ranks = world()
        odd = (rank + ranks * torch.arange(len(scaled), device=scaled.device)) % 2 == 1
        try:
            halves = [self._moments(scaled[half]) for half in (~odd, odd)]
            spectra = [self._spectrum(moments, scaled[half]) for moments, half in zip(halves, (~odd, odd), strict=True)]
            now = torch.stack([spectrum.sigma_residual for spectrum in spectra]).cpu()
            self._reference = now if self._reference is None else self._reference
            result.values[f"{self.name}/{GROWTH}"] = growth_across(self._reference, now, self.protocol.ridge)
        except ValueError as error:
            result.absent.update(self._keyed({GROWTH: f"of half of the images, {error}"}))

    def _read_companions(self, features: Tensor, result: SectionResult) -> None:
        if not self.companions:
            return
        values, absent = companion_values(self.companions, self._gather(features), self.labels)
        result.values.update({f"{self.name}/{key}": value for key, value in values.items()})
        result.absent.update(self._keyed(absent))

    def state_dict(self) -> dict[str, Tensor]:
        """The reference of later measurements, by name."""
        state = {}
        if self._basis is not None:
            # Columns of an eigenbasis are not contiguous, and safetensors refuses such tensors.
            state["basis"] = self._basis.cpu().contiguous()
        if self._reference is not None:
            state["reference"] = self._reference
        if self._lowest is not None:
            state["lowest"] = torch.cat([torch.tensor([self._lowest[0]], dtype=torch.float64), self._lowest[1]])
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self._basis, self._reference = state.get("basis"), state.get("reference")
        lowest = state.get("lowest")
        self._lowest = None if lowest is None else (float(lowest[0]), lowest[1:])

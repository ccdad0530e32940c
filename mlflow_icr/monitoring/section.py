"""A section of the report: all that the features of one network at one sigma say, and what that is relative to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mlflow_icr.monitoring.companions import companion_values
from mlflow_icr.monitoring.protocol import Protocol
from mlflow_icr.monitoring.ranks import gather_rows
from mlflow_icr.monitoring.shrinkage import shrunk
from mlflow_icr.representation import (
    InvariantSpectrum,
    ViewMoments,
    interval_from_terms,
    leave_one_out_terms,
    paired_difference,
    principal_directions,
)

RATIOS = ("icr", "icr_debiased", "indefinite_fraction")
INTERVAL = ("icr_low", "icr_high", "icr_rise", "icr_rise_low", "icr_rise_high")
ENERGIES = ("trace_invariant", "trace_residual", "fisher_residual_energy", "fisher_invariant_energy")
GROWTH = "fisher_residual_growth"
ALL = (*RATIOS, *INTERVAL, *ENERGIES, GROWTH)


@dataclass
class Found:
    """What a section found, by key: values, reasons for absences, one number for each image, and what makes a histogram."""

    values: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    distributions: dict[str, np.ndarray] = field(default_factory=dict)


class Section:
    """The values under one prefix, such as `repr`, and the earlier measurements that growth and rise are relative to."""

    def __init__(self, name: str, protocol: Protocol, companions: Sequence[str], labels: Tensor | None) -> None:
        self.name, self.protocol, self.companions, self.labels = name, protocol, companions, labels
        # All three come from measurements after step 0: what an untrained network's features say is nothing that was learned.
        self._basis: Tensor | None = None  # (D, projection), fitted at the first of them
        self._reference: InvariantSpectrum | None = None  # the first of them
        self._lowest: tuple[float, Tensor] | None = None  # the lowest debiased ICR and its influences (N,)

    def read(self, features: Tensor, step: int) -> Found:
        """Everything about this rank's features (N of this rank, K, D) at `step`; the same on all ranks."""
        found = Found()
        whole = features
        if self.protocol.projection is not None:
            if step == 0:
                why = "the projection is fitted at the first measurement after training has begun"
                found.absent.update(self._keyed(dict.fromkeys((*RATIOS, *INTERVAL, *ENERGIES, GROWTH), why)))
                self._read_companions(whole, found)
                return found
            features = features.double() @ self._projection(features)
        scaled = normalize(features, dim=-1) if self.protocol.normalisation == "l2" else features
        self._read_ratios(features, step, found)
        self._read_energies(scaled, step, found)
        self._read_companions(whole, found)
        return found

    def _keyed(self, values: dict[str, str]) -> dict[str, str]:
        return {f"{self.name}/{key}": value for key, value in values.items()}

    def _gather(self, rows: Tensor) -> Tensor:
        assert self.protocol.num_images is not None
        return gather_rows(rows, self.protocol.num_images)

    def _projection(self, features: Tensor) -> Tensor:
        if self._basis is None:
            assert self.protocol.projection is not None
            self._basis = principal_directions(self._moments(features), self.protocol.projection)
        return self._basis.to(features.device)

    @staticmethod
    def _moments(features: Tensor) -> ViewMoments:
        return ViewMoments(features.shape[1], features.shape[2]).update(features).all_reduce()

    def _spectrum(self, moments: ViewMoments, features: Tensor) -> InvariantSpectrum:
        if self.protocol.shrinkage == "none":
            return moments.spectrum(self.protocol.ridge)
        residuals = self._gather(moments.centred(features)[1])
        return shrunk(moments, residuals, self.protocol.shrinkage)

    def _read_ratios(self, features: Tensor, step: int, found: Found) -> None:
        moments = self._moments(features)
        try:
            spectrum = self._spectrum(moments, features)
        except ValueError as error:
            found.absent.update(self._keyed(dict.fromkeys((*RATIOS, *INTERVAL), str(error))))
            return
        found.values[f"{self.name}/icr"] = spectrum.icr
        found.values[f"{self.name}/indefinite_fraction"] = spectrum.indefinite_fraction
        found.distributions[f"{self.name}/eigenvalues"] = spectrum.eigenvalues.cpu().numpy()
        if spectrum.icr_debiased is None:
            found.absent.update(self._keyed(dict.fromkeys(("icr_debiased", *INTERVAL), spectrum.unavailable["icr_debiased"])))
            return
        found.values[f"{self.name}/icr_debiased"] = spectrum.icr_debiased
        try:
            terms = self._gather(leave_one_out_terms(moments, features))
        except ValueError as error:
            found.absent.update(self._keyed(dict.fromkeys(INTERVAL, str(error))))
            return
        interval = interval_from_terms(spectrum, terms)
        values = {"icr_low": interval.low, "icr_high": interval.high}
        found.arrays[f"{self.name}/influence"] = interval.influence.float().cpu().numpy()
        if step > 0:
            influence = interval.influence.cpu()
            if self._lowest is None or spectrum.icr_debiased < self._lowest[0]:
                self._lowest = spectrum.icr_debiased, influence
            rise = spectrum.icr_debiased - self._lowest[0]
            low, high = paired_difference(self._lowest[1], influence, rise)
            values |= {"icr_rise": rise, "icr_rise_low": low, "icr_rise_high": high}
        found.values.update({f"{self.name}/{key}": value for key, value in values.items()})

    def _read_energies(self, scaled: Tensor, step: int, found: Found) -> None:
        moments = self._moments(scaled)
        residuals = self._gather(moments.centred(scaled)[1].square().sum((1, 2)))
        if float(residuals.sum()) > 0:
            found.arrays[f"{self.name}/residual_share"] = (residuals / residuals.sum()).float().cpu().numpy()
        try:
            energies = self._spectrum(moments, scaled)
        except ValueError as error:
            found.absent.update(self._keyed(dict.fromkeys((*ENERGIES, GROWTH), str(error))))
            return
        found.values.update({f"{self.name}/{key}": getattr(energies, key) for key in ENERGIES})
        if step > 0:
            self._reference = self._reference or energies
            found.values[f"{self.name}/{GROWTH}"] = energies.fisher_residual_growth(self._reference)

    def _read_companions(self, features: Tensor, found: Found) -> None:
        if not self.companions:
            return
        values, absent = companion_values(self.companions, self._gather(features), self.labels)
        found.values.update({f"{self.name}/{key}": value for key, value in values.items()})
        found.absent.update(self._keyed(absent))

    def state_dict(self) -> dict[str, Tensor]:
        """What later measurements are relative to, by name."""
        state = {}
        if self._basis is not None:
            state["basis"] = (
                self._basis.cpu().contiguous()
            )  # columns of an eigenbasis, which safetensors does not take as they are
        if self._reference is not None:
            state["reference"] = self._reference.sigma_residual.cpu()
        if self._lowest is not None:
            state["lowest"] = torch.cat([torch.tensor([self._lowest[0]], dtype=torch.float64), self._lowest[1]])
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        p = self.protocol
        assert p.num_images is not None
        assert p.num_views is not None
        self._basis = state.get("basis")
        sigma = state.get("reference")
        self._reference = None
        if sigma is not None:
            ridge = 0.0 if p.shrinkage != "none" else p.ridge  # a shrunk covariance was saved as it is
            self._reference = InvariantSpectrum(torch.zeros_like(sigma), sigma, p.num_images, p.num_views, ridge)
        lowest = state.get("lowest")
        self._lowest = None if lowest is None else (float(lowest[0]), lowest[1:])

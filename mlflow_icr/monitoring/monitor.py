"""The monitor: it measures the representation of a denoiser on its training images."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mlflow_icr.extraction.denoisers import Denoiser, null_class_of
from mlflow_icr.monitoring.companions import check_companions, network_companions
from mlflow_icr.monitoring.compare import Comparison, difference_of
from mlflow_icr.monitoring.error_values import read_errors
from mlflow_icr.monitoring.errors import LEVELS, ErrorReader
from mlflow_icr.monitoring.neighbours import neighbour_pictures, residual_wall
from mlflow_icr.monitoring.protocol import Protocol
from mlflow_icr.monitoring.ranks import gather_rows
from mlflow_icr.monitoring.reader import FeatureReader
from mlflow_icr.monitoring.report import Report
from mlflow_icr.monitoring.section import ALL, Section, SectionResult


class ICRMonitor:
    """Measures the Invariant Contamination Ratio, its interval and its energies of a denoiser on its own training images.

    `denoiser` is measured (give it the EMA weights, which one samples from). `raw`, if given, is measured too, under
    `repr_raw/`. A class-conditional network is read with its null class and, if there are `labels`, also with each image's own
    class, under `repr_class/`. `images` are (N, C, H, W), uint8 or floats in [0, 1]; the protocol's first num_images are used.
    `companions` names further measures to log; some need `labels`, (N,) integers. With `pictures` every report shows nearest
    images by invariant and residual part, and the images with the largest shares of the residual energy. Views are made once
    and kept while they take no more than `cache_bytes`; `batch_size` views are read at a time, or as many as fit the memory.
    `heldout` images, (M, C, H, W), are denoised beside the training images if they are given. Growth and rise are relative to
    step 0 for a network that was `trained_before`, else to the first measurement after it. `knows_labels` is False where the
    network's classes are not those of `labels`; then it is read with its null class alone. Under torch.distributed every rank
    calls `measure`, takes its share of the images, and gets the same report. Raises ValueError for images, companions or a
    protocol that do not fit.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        images: Tensor,
        protocol: Protocol | None = None,
        *,
        raw: Denoiser | None = None,
        companions: Sequence[str] = (),
        labels: Tensor | None = None,
        pictures: bool = False,
        batch_size: int = 512,
        cache_bytes: int = 64 * 2**20,
        heldout: Tensor | None = None,
        trained_before: bool = False,
        knows_labels: bool = True,
    ) -> None:
        check_companions(companions, labels is not None)
        self.reader = FeatureReader(denoiser, images, protocol or Protocol(), batch_size, cache_bytes)
        self.errors = ErrorReader(self.reader.images, self.protocol, self.reader.batches.size, heldout)
        self.companions = tuple(companions)
        self._networks = {"repr": denoiser} | ({} if raw is None else {"repr_raw": raw})
        self.pictures, self.labels = pictures, None if labels is None else labels[: self.protocol.num_images]
        self.features: Tensor | None = None  # (N, K, D) of the last measurement of `repr`, where pictures need them
        if self.labels is not None and knows_labels and null_class_of(denoiser) is not None:
            self._networks["repr_class"] = denoiser
        self._measured: dict[int, tuple[float, Tensor]] = {}  # debiased ICR and influences (N,) by step
        self.sections: dict[tuple[str, float], Section] = {}
        for place, sigma in enumerate(self.protocol.sigmas):
            suffix = "" if place == 0 else f"_sigma{sigma:g}"
            for prefix in self._networks:
                self.sections[prefix, sigma] = Section(prefix + suffix, self.protocol, companions, self.labels, trained_before)

    @property
    def protocol(self) -> Protocol:
        """The protocol, with its numbers of images and views fixed."""
        return self.reader.protocol

    @property
    def dim(self) -> int:
        """D, the width of the layer."""
        return self.reader.dim

    def measure(self, step: int) -> Report:
        """The report at `step` images seen; weights, training flags and random number generators stay as they are."""
        started = time.perf_counter()
        values: dict[str, float] = {}
        absent: dict[str, str] = {}
        arrays: dict[str, np.ndarray] = {} if self.labels is None else {"label": self.labels.numpy()}
        figures: dict[str, np.ndarray] = {}
        distributions: dict[str, np.ndarray] = {}
        for (prefix, sigma), section in self.sections.items():
            try:
                features = self.reader.read(self._networks[prefix], sigma, self._labels_for(prefix))
            except ValueError as error:  # not finite: training has diverged, but may continue
                absent.update({f"{section.name}/{key}": str(error) for key in (*ALL, *section.companions)})
                continue
            result = section.read(features, step)
            self._read_denoising(section.name, prefix, sigma, result)
            values.update(result.values)
            absent.update(result.absent)
            arrays.update(result.arrays)
            distributions.update(result.distributions)
            if self.pictures and section.name == "repr":
                figures.update(self._pictures(features, result.arrays))
        if "repr/influence" in arrays:
            self._measured[step] = values["repr/icr_debiased"], torch.from_numpy(arrays["repr/influence"])
        values["perf/measure_seconds"] = time.perf_counter() - started
        return Report(step, values, figures, absent, self.protocol.digest, arrays, distributions=distributions)

    def _labels_for(self, prefix: str) -> Tensor | None:
        """The classes (N,) that the network of a section is conditioned on; None for none."""
        return self.labels if prefix == "repr_class" else None

    def _read_denoising(self, name: str, prefix: str, sigma: float, result: SectionResult) -> None:
        """Enter a network's denoising errors at sigma and, for the first network, at levels around it."""
        denoiser, trained = self._networks[prefix], self.protocol.training_augmentations
        for level in (1.0, *(LEVELS if name == "repr" else ())):
            errors = self.errors.read(denoiser, level * sigma, monitored=level == 1, labels=self._labels_for(prefix))
            read_errors(name, errors, level, self.errors.chosen, trained, result)
        if name == "repr" and self.errors.far_bias is not None:
            result.values["repr/far_bias"] = self.errors.far_bias.value
        elif name == "repr" and "far" in self.errors.columns:
            result.absent["repr/far_bias"] = "each image has an exact copy: expected images that differ"
        values, absent = network_companions(self.companions, denoiser, sigma, self.errors)
        result.values |= {f"{name}/{key}": value for key, value in values.items()}
        result.absent |= {f"{name}/{key}": reason for key, reason in absent.items()}

    def _pictures(self, features: Tensor, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.features = gather_rows(features, len(self.reader.images))
        figures = neighbour_pictures(self.features, self.reader.images, self.protocol)
        if "repr/residual_share" in arrays:
            figures["largest_residuals"] = residual_wall(arrays, self.reader.images)
        return figures

    def compare(self, step_a: int, step_b: int, level: float = 0.95) -> Comparison:
        """The debiased ICR at step b less that at step a, two steps that this monitor measured, with its interval.

        For steps of an earlier process, see the function `compare`. Raises ValueError for a step without an interval.
        """
        for name, step in (("step_a", step_a), ("step_b", step_b)):
            if step not in self._measured:
                available = ", ".join(map(str, self._measured)) or "none"
                raise ValueError(f"{name} is {step}; expected a step that was measured with an interval: {available}")
        return difference_of(self._measured[step_a], self._measured[step_b], level)

    def state_dict(self) -> dict[str, Tensor]:
        """The reference of growth, rise and projection, for a run that resumes."""
        return {
            f"{section.name}/{key}": value for section in self.sections.values() for key, value in section.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the state of an earlier run of this protocol; the inverse of `state_dict`."""
        for section in self.sections.values():
            prefix = f"{section.name}/"
            section.load_state_dict({key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)})

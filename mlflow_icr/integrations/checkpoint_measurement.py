"""Measure the checkpoints of one training on the same views of the same images, in any order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlflow_icr.extraction.adapters.choose import image_channels
from mlflow_icr.extraction.denoisers import Denoiser
from mlflow_icr.extraction.files import check_outside
from mlflow_icr.extraction.images import content_hash, folder_labels, load_folder, with_channels
from mlflow_icr.extraction.pipelines import batch_size_for
from mlflow_icr.integrations.lora import few_images_protocol
from mlflow_icr.integrations.saved import SavedCheckpoint, SavedTraining, Units
from mlflow_icr.integrations.watch import MONITOR_STATE, described, load_state, state_of
from mlflow_icr.monitoring import ICRMonitor, Protocol, Report
from mlflow_icr.monitoring.reader import FeatureReader
from mlflow_icr.monitoring.section import Section
from mlflow_icr.monitoring.series import HISTORY, read_arrays
from mlflow_icr.tracking import Tracker, check_folder

SETTINGS = "backfill.json"  # of the settings that all measurements of a folder share
RISES = ("icr_rise", "icr_rise_low", "icr_rise_high")
SHOWN = ("icr", "icr_debiased", "view_error_ratio")


class CheckpointMeasurement:
    """A training's network, the images that it is measured on, and the folder of its measurements.

    `data` is the folder of training images; `options` are those of `load_pipeline`, kept with the folder. Continues after an
    earlier process. Raises ValueError for images or a protocol that do not fit, and for a folder that was measured with other
    settings.
    """

    def __init__(
        self,
        training: SavedTraining,
        data: Path | str,
        output_dir: Path,
        *,
        units: Units,
        protocol: Protocol | None = None,
        companions: Sequence[str] = (),
        batch_size: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.training, self.output_dir, self.units = training, output_dir, units
        images = with_channels(load_folder(data, training.side), image_channels(training.denoiser))
        batch_size = batch_size or batch_size_for(training.denoiser)
        self.monitor = ICRMonitor(
            training.denoiser,
            images,
            suited_protocol(protocol or Protocol(), training.denoiser, images, batch_size),
            companions=companions,
            labels=folder_labels(data),
            batch_size=batch_size,
        )
        options = options or {}
        self.settings = {
            "protocol_digest": self.monitor.protocol.digest,
            "probe_sha256": content_hash(self.monitor.reader.images),
            "images_per_step": units.images_per_step,
            "images_per_epoch": units.images_per_epoch,
            "dtype": options.get("dtype", "float32"),
            "prompt": options.get("prompt", ""),
            "class_label": options.get("class_label"),
        }
        _check_settings(output_dir, self.settings)
        load_state(output_dir, self.monitor)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the measurement, for trackers."""
        return {**described(self.monitor, self.training.denoiser), "images_per_step": self.units.images_per_step}

    def measure(self, checkpoint: SavedCheckpoint, tracker: Tracker, waiting: int = 0, *, time: float | None = None) -> Report:
        """Load a checkpoint, measure it, and record it; `waiting` is how many earlier ones are still to be measured.

        `time`, in Unix seconds, is that of the measurement, if it is not now. Raises ValueError for weights that do not fit.
        """
        self.training.load(checkpoint.files)
        return self.record(checkpoint.step, tracker, waiting, time=time)

    def record(self, step: int, tracker: Tracker, waiting: int = 0, *, time: float | None = None) -> Report:
        """Measure the loaded weights, and record the report at `step`."""
        steps = [int(row["images_seen"]) for row in tracker.journal.rows]
        ordered = steps == sorted(steps)
        if not ordered or (steps and step < steps[-1]):
            self._relate_to_earlier(step, tracker.journal.rows)
        report = self.monitor.measure(step)
        if waiting:
            report = _without_rises(report, self.monitor.sections.values(), waiting)
        # Before the row: after a kill between the two, this step is measured again with the same values.
        tracker.journal.write_file(MONITOR_STATE, state_of(self.monitor))
        tracker.record(report, time=time)
        return report

    def _relate_to_earlier(self, step: int, rows: Sequence[Mapping[str, float]]) -> None:
        """Make the rise at a step relative to the lowest value before it, which the journal has."""
        state = self.monitor.state_dict()
        for section in self.monitor.sections.values():
            state.pop(f"{section.name}/lowest", None)
            lowest = _lowest_before(step, rows, section, self.output_dir)
            if lowest is not None:
                state[f"{section.name}/lowest"] = lowest
        self.monitor.load_state_dict(state)


def suited_protocol(protocol: Protocol, denoiser: Denoiser, images: Tensor, batch_size: int) -> Protocol:
    """The protocol itself or, if it leaves the views open and no number of views is enough, the protocol for few images.

    Few images do not span a layer of a thousand channels. Along the directions that they span, ICR has a value.
    """
    if protocol.num_views is not None or protocol.projection is not None or protocol.shrinkage != "none":
        return protocol
    count = protocol.num_images or len(images)
    dim = FeatureReader(denoiser, images[:2], replace(protocol, num_images=2, num_views=2), batch_size, 0).dim
    resolved = protocol.resolve(images=len(images), dim=dim)
    if (count - 1) * ((resolved.num_views or 0) - 1) > 2 * dim:
        return protocol
    few = few_images_protocol(count, dim)
    return replace(protocol, num_images=count, num_views=few.num_views, projection=few.projection)


def _lowest_before(step: int, rows: Sequence[Mapping[str, float]], section: Section, folder: Path) -> Tensor | None:
    """The lowest debiased ICR of a section at earlier steps after 0, followed by its influences; None without one."""
    key = f"{section.name}/icr_debiased"
    earlier = [(row[key], int(row["images_seen"])) for row in rows if key in row and 0 < row["images_seen"] < step]
    for value, at in sorted(earlier):
        try:
            influence = read_arrays(folder, at)[f"{section.name}/influence"]
        except (OSError, KeyError):  # that measurement has no interval
            continue
        return torch.cat([torch.tensor([value], dtype=torch.float64), torch.from_numpy(influence).double()])
    return None


def _without_rises(report: Report, sections: Any, waiting: int) -> Report:
    """A report without the rise over the lowest value so far, which is unknown while earlier checkpoints wait."""
    keys = {f"{section.name}/{key}" for section in sections for key in RISES}
    why = "earlier checkpoints, above which ICR may have risen, are not measured yet"
    missing = {key: why for key in keys if key in report.values}
    return replace(report.without(keys), absent={**report.absent, **missing})


def line_of(name: str, report: Report) -> str:
    """A measurement in one line."""
    by_key = {key: report.values.get(f"repr/{key}") for key in SHOWN}
    values = ", ".join(f"{key} {value:.4g}" for key, value in by_key.items() if value is not None)
    return f"{name}: {report.step} images seen, {values or 'nothing could be measured'}"


def check_output(out: Path, data: Path | str) -> None:
    """Raise ValueError for a folder inside the data, or one that holds another run than one of measured checkpoints."""
    check_outside(out, data)
    if not (out / SETTINGS).is_file():
        check_folder(out, resume=False)


def _check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    path = out / SETTINGS
    if not path.is_file() or not (out / HISTORY).exists():
        return
    stored = json.loads(path.read_text())
    for key in sorted(settings):
        if key in stored and stored[key] != settings[key]:
            raise ValueError(
                f"{key} is {settings[key]!r}, but {str(out)!r} was measured with {stored[key]!r}; expected the same, or "
                "another output_dir"
            )

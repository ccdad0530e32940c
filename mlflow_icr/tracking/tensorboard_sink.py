"""Results in TensorBoard: the same keys over the same steps, hparams in the run's own folder, sample grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_icr.monitoring.report import Report
from mlflow_icr.monitoring.verdict import Verdict
from mlflow_icr.tracking.logged import Logged

# What the custom scalars page shows: values with their intervals, and what belongs together. Tags of "Multiline" are patterns.
LAYOUT = {
    "ICR and copies": {
        "ICR, debiased, with its 95 % interval": ["Margin", ["repr/icr_debiased", "repr/icr_low", "repr/icr_high"]],
        "share of samples that are copies": ["Margin", ["mem/ratio_l2", "mem/ratio_l2_low", "mem/ratio_l2_high"]],
        "ICR and copies on one axis": ["Multiline", ["^repr/icr_debiased$", "^mem/ratio_l2$"]],
    },
    "learning by heart": {
        "view error ratio": [
            "Margin", ["repr/view_error_ratio", "repr/view_error_ratio_low", "repr/view_error_ratio_high"],
        ],
        "energies along Fisher directions": ["Multiline", ["^repr/fisher_residual_energy$", "^repr/fisher_invariant_energy$"]],
        "losses": ["Multiline", ["^loss/train_eval$", "^loss/heldout$"]],
    },
    "samples": {
        "kernel distances": ["Multiline", ["^gen/kid_[a-z0-9]+$", "^gen/kid_train_[a-z0-9]+$"]],
        "Frechet distances": ["Multiline", ["^gen/fd_[a-z0-9]+$", "^gen/fd_train_[a-z0-9]+$"]],
    },
}  # fmt: skip
TABLE_ROWS = 50


class TensorBoardSink:
    """Writes event files into one folder, flushed after every measurement. Use it on the main process only.

    Scalars are float32 there: the plain kind, which every reader of event files knows.
    """

    name = "TensorBoard"

    def __init__(self, log_dir: Path | str) -> None:
        self.log_dir = Path(log_dir)
        self._writer: Any = None

    def bind(self, folder: Path) -> None:
        """Nothing: the event files have a folder of their own."""

    def open(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Start an event file; a new run's hparams go in first."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        resumed = any(self.log_dir.glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(str(self.log_dir))
        if not resumed:
            plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in params.items()}
            # add_hparams would open a sub-run of its own. Of its three parts the first, a list of columns, is left out: the one
            # that TensorBoard finds first counts for all runs of a folder, and hides what others have.
            for part in hparams(plain, {})[1:2]:
                self._writer.file_writer.add_summary(part)
            self._writer.add_custom_scalars(LAYOUT)
            self._writer.add_text("run", "\n\n".join(f"**{key}**: {value}" for key, value in tags.items()), 0)
        self._writer.flush()

    def dataset(self, description: Mapping[str, str], context: str) -> None:
        """Add what a set of images is as text."""
        lines = [f"**{key}**: {description[key]}" for key in ("name", "digest", "profile") if key in description]
        self._writer.add_text(f"data/{context}", "\n\n".join(lines), 0)

    def recorded(self) -> Mapping[int, set[str]]:
        """Keys by step of all that is in the folder's event files."""
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        found: dict[int, set[str]] = {}
        for path in sorted(self.log_dir.glob("events.out.tfevents.*")):
            for event in LegacyEventFileLoader(str(path)).Load():
                for value in event.summary.value:
                    found.setdefault(event.step, set()).add(value.tag)
        return found

    def _moment(self, step: int) -> float | None:
        """When what is said of a step was found, in seconds: None for now, unless somebody knows better."""
        return None

    def write(self, report: Report) -> None:
        """Add a report's values as scalars and its pictures as images, its distributions as histograms."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        time = self._moment(report.step)
        # One event for all scalars: the writer's queue holds ten, and makes a training wait that adds more.
        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in report.values.items()]
        self._writer.file_writer.add_summary(Summary(value=scalars), report.step, walltime=time)
        for key, picture in report.figures.items():
            self._writer.add_image(key, picture, report.step, walltime=time, dataformats="HWC")
        for key, numbers in report.distributions.items():
            self._writer.add_histogram(key, numbers, report.step, walltime=time)
        for key, why in report.absent.items():
            self._writer.add_text(f"absent/{key}", why, report.step)
        for key, text in report.warnings.items():
            self._writer.add_text(f"warning/{key}", text, report.step)
        self._writer.flush()

    def log(self, rows: Sequence[Logged]) -> None:
        """Add values and texts of somebody else's training at their own steps and times."""
        for row in rows:
            for key, value in row.values.items():
                self._writer.add_scalar(key, value, row.step, walltime=row.time)
            for key, text in row.texts.items():
                self._writer.add_text(key, text, row.step, walltime=row.time)
        self._writer.flush()

    def summary(self, values: Mapping[str, float], step: int) -> None:
        """Add the summary metrics at the last step."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def verdict(self, verdict: Verdict, step: int) -> None:
        """Add the verdict as text at its step; it follows from the journal, and waits for the next flush."""
        self._writer.add_text("verdict", verdict.text, step)

    def table(self, name: str, rows: Sequence[Mapping[str, object]], step: int) -> None:
        """Add the first rows of a table as text, in Markdown."""
        lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
        for row in rows[:TABLE_ROWS]:
            cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
            lines.append("| " + " | ".join(cells) + " |")
        self._writer.add_text(f"tables/{name}", "\n".join(lines), step)

    def figure(self, name: str, picture: np.ndarray, step: int) -> None:
        """Add a figure of the whole run as an image."""
        self._writer.add_image(f"figures/{name}", picture, step, dataformats="HWC")
        self._writer.flush()

    def checkpoint(self, folder: Path, row: Mapping[str, float], found: Verdict, *, kept: bool = False) -> None:
        """Nothing: event files hold no models."""

    def embedding(self, name: str, vectors: np.ndarray, images: np.ndarray, labels: Sequence[str], step: int) -> None:
        """Add vectors (N, D) with thumbnails to the projector."""
        from torch import from_numpy

        thumbnails = from_numpy(images).permute(0, 3, 1, 2).float() / 255
        self._writer.add_embedding(from_numpy(vectors), list(labels), thumbnails, global_step=step, tag=name)

    def artifact(self, path: str, folder: str | None = None) -> None:
        """Nothing: event files hold no pages."""

    def close(self, status: str) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.add_text("status", status)
            self._writer.close()

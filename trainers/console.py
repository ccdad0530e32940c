"""Output on the terminal: a progress bar, or plain lines if output goes to a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from mlflow_icr import Report, Verdict
from trainers.config import TrainConfig
from trainers.loop import TrainState

LOSS_EVERY_SECONDS = 2.0  # reading the loss waits for the device
SPEED_AFTER_SECONDS = 60.0
LONG_HOURS = 1.0  # plain output, which has no bar, names the length of a training that takes longer


class Console:
    """Progress with images/s, loss and the latest ICR; one line for every measurement."""

    def __init__(self, config: TrainConfig, *, shown: bool, images_seen: int = 0) -> None:
        self.shown = shown
        self.batch_size = config.optimizer.batch_size
        self._total = -(-config.total_images // self.batch_size) * self.batch_size  # whole batches
        self.bar = tqdm(
            total=self._total,
            initial=images_seen,  # images seen before a resumption, which do not count for the speed
            unit="img",
            unit_scale=True,
            disable=not (shown and sys.stderr.isatty()),
            dynamic_ncols=True,
        )
        self._icr = ""
        self._read = time.monotonic()
        self._since: tuple[float, int] | None = None  # time and images seen at the first step after a measurement
        self._length_is_printed = False

    def step(self, state: TrainState) -> None:
        """Advance to the state's images seen."""
        if self.bar.disable:
            self._print_length(state.images_seen)
            return
        self.bar.update(state.images_seen - self.bar.n)
        if time.monotonic() - self._read > LOSS_EVERY_SECONDS and state.loss_steps:
            self._read = time.monotonic()
            self.bar.set_postfix_str(f"loss {float(state.loss_sum) / state.loss_steps:.3f}{self._icr}")

    def _print_length(self, images_seen: int) -> None:
        """Print once how long a long training takes, which the bar would show."""
        if self._length_is_printed or not self.shown:
            return
        now = time.monotonic()
        if self._since is None:
            self._since = now, images_seen
        seconds, images = now - self._since[0], images_seen - self._since[1]
        if seconds >= SPEED_AFTER_SECONDS and images:
            self._length_is_printed = True
            hours = (self._total - images_seen) * seconds / images / 3600
            if hours > LONG_HOURS:
                speed, total = f"{images / seconds:.0f} images/s", f"{self._total / 1000:,.0f} kimg"
                self._line(f"{speed}: the {total} of total_kimg take {hours:,.0f} h more, and measurements come on top")

    def measured(self, report: Report) -> None:
        """Print a measurement."""
        self._since = None
        v = report.values
        if "repr/icr" in v:
            self._icr = f", ICR {v['repr/icr']:.3f}"
        names = {
            "repr/icr": "ICR",
            "repr/icr_debiased": "debiased",
            "repr/far_error_ratio": "far views",
            "mem/ratio_l2": "copies",
            "gen/fd_pixels": "FD(pixels)",
        }
        parts = [f"{name} {v[key]:.3f}" for key, name in names.items() if key in v]
        if "loss/train" in v:
            parts.append(f"loss {v['loss/train']:.3f}")
        if "perf/images_per_second" in v:
            parts.append(f"{v['perf/images_per_second']:.0f} images/s")
        self._line(f"{report.step / 1000:8.1f} kimg  {'  '.join(parts)}")

    def _line(self, text: str) -> None:
        if self.shown:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def stopped(self, verdict: Verdict) -> None:
        """Print why training ends before its budget."""
        self._line(f"stops: {verdict.state}; {'; '.join(verdict.evidence)}")

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()

    def summary(self, values: Mapping[str, float], verdict: Verdict, status: str, output_dir: Path) -> None:
        """Print a summary of the history in two lines."""
        parts = []
        if "icr_min" in values:
            parts.append(f"lowest ICR {values['icr_min']:.3f} at {values['icr_min_images_seen'] / 1000:.1f} kimg")
        if "mem_onset_images_seen" in values:
            parts.append(f"copies from {values['mem_onset_images_seen'] / 1000:.1f} kimg on")
            if "lead_images" in values:
                parts.append(f"a lead of {values['lead_images'] / 1000:.1f} kimg")
        elif parts:
            parts.append("no copies by the distance ratio")
        line = f"verdict: {verdict.state}"
        if verdict.turned_at is not None:
            assert verdict.low is not None
            assert verdict.high is not None
            between = f"{verdict.low / 1000:.1f} to {verdict.high / 1000:.1f}"
            line += f", turned at {verdict.turned_at / 1000:.1f} kimg ({between})"
            line += f"; keep checkpoints/{verdict.checkpoint_images_seen:012d}"
        self._line(line)
        if verdict.forecast.images_seen is not None:
            self._line(verdict.forecast.text)
        self._line(f"{status.lower()}: {', '.join(parts) or 'nothing measured'}; everything is in {output_dir}")

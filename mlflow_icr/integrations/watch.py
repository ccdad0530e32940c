"""The watch: it measures a denoiser in any training loop, when a measurement is due, and records the reports."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from mlflow_icr.extraction.denoisers import Denoiser, device_of
from mlflow_icr.extraction.images import content_hash
from mlflow_icr.monitoring import GenerationMonitor, ICRMonitor, Protocol, Report, Verdict
from mlflow_icr.monitoring.ranks import sum_over_ranks, world
from mlflow_icr.monitoring.schedule import SUSPICION, looks_every, measuring_steps
from mlflow_icr.monitoring.verdict import MEMORIZING, TURNING, VerdictTracker, folded
from mlflow_icr.tracking import Logged, Tracker, check_folder, folder_tracker
from mlflow_icr.tracking.checkpoints.folder import ALL, mark_turning, remove_old, write_checkpoint
from mlflow_icr.tracking.ending import end_at_exit, status_of

STOP_VERDICTS = (TURNING, MEMORIZING)  # in this order: memorizing comes after turning
MONITOR_STATE = "monitor.safetensors"
# Ranks count their own images. Summing them after every batch would make the ranks wait for each other.
COUNT_EVERY = 8


def check_stop_on(stop_on: str) -> None:
    """Raise ValueError unless it is a verdict to stop on, or empty."""
    if stop_on not in ("", *STOP_VERDICTS):
        raise ValueError(f"stop_on is {stop_on!r}; expected one of {', '.join(STOP_VERDICTS)}, or empty")


def described(monitor: ICRMonitor, denoiser: Denoiser) -> dict[str, Any]:
    """The parameters of a measurement, for trackers."""
    p, images = monitor.protocol, monitor.reader.images
    params: dict[str, Any] = {f"protocol.{f.name}": getattr(p, f.name) for f in dataclasses.fields(p)}
    params |= {"protocol_digest": p.digest, "feature_dim": monitor.dim, "world_size": world()[1]}
    params |= {"denoiser": type(denoiser).__name__, "torch_version": torch.__version__}
    return params | ({"probe_sha256": content_hash(images)} if images.dtype == torch.uint8 else {})


def state_of(monitor: ICRMonitor) -> bytes:
    """The reference of growth and rise, as the content of a file."""
    return save(monitor.state_dict(), {"protocol_digest": monitor.protocol.digest})


def load_state(output_dir: Path, monitor: ICRMonitor) -> None:
    """Load the reference of growth and rise from a folder. Raises ValueError if its protocol is another."""
    path = output_dir / MONITOR_STATE
    if not path.exists():  # the run ended before its first measurement
        return
    with safe_open(path, "pt") as file:
        digest = (file.metadata() or {}).get("protocol_digest")
    if digest != monitor.protocol.digest:
        raise ValueError(f"protocol_digest is {monitor.protocol.digest}, but {str(output_dir)!r} has {digest}")
    monitor.load_state_dict(load_file(path))


class ICRWatch:
    """Measures a denoiser on its training images (N, C, H, W) when it is due; records it in a folder, MLflow, TensorBoard.

    Call `watch(images_seen)` after each step. It measures when the next point of the schedule is reached: every so many images,
    at given ones, or (None) three times in each doubling. It returns whether to stop: with `stop_on`, from that verdict
    (turning or memorizing) on. All ranks call it and get the same answer; the main rank writes. `refresh` is called before a
    measurement, on all ranks. `generation` measures samples too: on suspicion (when the verdict is not *generalizing*) and at
    the end, or at every so many measurements, by `generate_every`.

    Without a `tracker`, which the caller would close, the watch has its own: use the watch as a context, or `close` it, which
    writes the report. With `resume` it continues in the folder, and in its MLflow run, from `images_seen`. Raises ValueError
    for images, protocol, schedule, `stop_on` or a folder that do not fit, before any work.

    `save`, such as a pipeline's `save_pretrained`, writes the measured network into a folder, on the main rank. That is a
    checkpoint, and a model in MLflow. `checkpoints_total_limit` checkpoints stay, besides those to keep; 0 for all.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        images: Tensor,
        output_dir: Path | str,
        *,
        schedule: int | Iterable[int] | None = None,
        protocol: Protocol | None = None,
        generation: GenerationMonitor | None = None,
        generate_every: int | str = SUSPICION,
        stop_on: str = "",
        refresh: Callable[[], object] | None = None,
        labels: Tensor | None = None,
        pictures: bool = True,
        batch_size: int = 512,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
        run_name: str | None = None,
        resume: bool = False,
        images_seen: int = 0,
        tracker: Tracker | None = None,
        save: Callable[[Path], object] | None = None,
        checkpoints_total_limit: int = 0,
    ) -> None:
        check_stop_on(stop_on)
        if checkpoints_total_limit < 0:
            raise ValueError(f"checkpoints_total_limit is {checkpoints_total_limit}; expected a number >= 0, 0 for all")
        self._save, self._limit = save, checkpoints_total_limit
        self._due = measuring_steps(schedule)
        self._next: int | None = next((point for point in self._due if point >= images_seen), None)
        self.output_dir, self.stop_on, self._refresh = Path(output_dir), stop_on, refresh
        self.is_main = world()[0] == 0
        if tracker is None and self.is_main:
            check_folder(output_dir, resume)
        if refresh is not None:
            refresh()
        self.monitor = ICRMonitor(denoiser, images, protocol, labels=labels, pictures=pictures, batch_size=batch_size)
        self.generation, self.denoiser = generation, denoiser
        self._looks_every, self._measured = looks_every(generate_every), 0
        self._verdicts: VerdictTracker | None = None  # of the folder's rows and the present one, on the main rank
        self.images_seen, self.stops = images_seen, False
        self.measured_at: int | None = None  # images seen of the newest measurement of this process
        self.pending, self._batches = 0, 0
        if resume:
            load_state(self.output_dir, self.monitor)
        self._owned, self.tracker = tracker is None, tracker
        self._cancel_exit: Callable[[], None] = lambda: None
        if self.is_main:
            self._open(params or {}, tags or {}, run_name, resume)

    def _open(self, params: Mapping[str, object], tags: Mapping[str, str], run_name: str | None, resume: bool) -> None:
        measured = described(self.monitor, self.denoiser)
        if self.tracker is None:
            log_models = None if self._save is None else ALL
            self.tracker = folder_tracker(self.output_dir, run_name=run_name, resume=resume, log_models=log_models)
            self.tracker.open({**params, **measured}, tags)
            self._cancel_exit = end_at_exit(self._close)
        else:
            text = json.dumps({**params, **measured})
            self.tracker.log(Logged(0, time.time(), {}, {"protocol": text}))

    def __call__(self, images_seen: int) -> bool:
        """Measure if it is due at `images_seen` (of all ranks); returns whether to stop, the same on all ranks."""
        self.images_seen = images_seen
        if self._next is not None and images_seen >= self._next:
            while self._next is not None and self._next <= images_seen:  # a large batch may step over several
                self._next = next(self._due, None)
            self.measure()
        return self.stops

    def add(self, count: int) -> bool:
        """Like a call, with the number of images in this rank's last batch; ranks may have different numbers."""
        self.pending += count
        self._batches += 1
        if world()[1] > 1 and self._batches % COUNT_EVERY:
            return self.stops
        return self(self.images_seen + self._gather_count())

    def _gather_count(self) -> int:
        total = sum_over_ranks(self.pending, device_of(self.denoiser))
        self.pending = 0
        return total

    def measure(self, judged: bool = False) -> Report | None:
        """Measure now, whatever the schedule, with samples if `judged`; on all ranks. None if this step was measured before."""
        step = self.images_seen
        if self.measured_at == step:
            return None
        if self._refresh is not None:
            self._refresh()
        report = self._report(step, judged)
        self.measured_at = step
        wants_stop = False
        if self.tracker is not None and self.is_main:
            # Before the row: a kill between the two must not leave a history whose reference is lost.
            self.tracker.journal.write_file(MONITOR_STATE, state_of(self.monitor))
            self.tracker.record(report)
            verdict = self.verdict
            wants_stop = bool(self.stop_on) and verdict.state in STOP_VERDICTS[STOP_VERDICTS.index(self.stop_on) :]
            self._checkpoint(self.tracker, step, verdict)
        self.stops = sum_over_ranks(int(wants_stop), device_of(self.denoiser)) > 0
        return report

    def _report(self, step: int, judged: bool) -> Report:
        """The report at a step, with samples if they are due, and the forecast; on all ranks."""
        report, looks = self.monitor.measure(step), judged
        if self.tracker is not None and self.is_main:
            rows = self.tracker.journal.rows
            newest = None if self._verdicts is None else self._verdicts.newest
            if self._verdicts is None or (newest is not None and step <= newest):  # a new run in the folder of another
                self._verdicts = folded([*rows, report.flat()])
            else:
                self._verdicts.add(report.flat())
            looks |= self._looks_every is None and self._verdicts.verdict.wants_samples
        looks |= self._looks_every is not None and self._measured % self._looks_every == 0
        self._measured += 1
        if self.generation is not None and sum_over_ranks(int(looks), device_of(self.denoiser)) > 0:
            samples = self.generation.measure(step)
            report = report.joined(samples)
            if self._verdicts is not None and step == self._verdicts.newest:
                self._verdicts.add_samples(samples.flat())
        return report if self._verdicts is None else report.joined(Report(step, self._verdicts.verdict.forecast.values()))

    def _checkpoint(self, tracker: Tracker, step: int, verdict: Verdict) -> None:
        if self._save is None:
            return
        folder = tracker.journal.folder
        write_checkpoint(folder, step, self._save)
        mark_turning(folder, verdict)
        tracker.checkpoint(step)
        assert self._verdicts is not None
        remove_old(folder, self._limit, self._verdicts.may_be_kept)

    @property
    def verdict(self) -> Verdict:
        """The verdict on the history so far, on the main rank."""
        assert self.tracker is not None
        return self.tracker.verdict

    def finish(self) -> None:
        """Measure at the end of training, unless that step was measured, and close; on all ranks."""
        self.images_seen += self._gather_count()
        self.measure(judged=True)
        self.close()

    def close(self, status: str = "FINISHED") -> None:
        """End the run with a status, FINISHED, FAILED or KILLED. Does nothing the second time."""
        self._cancel_exit()
        self._close(status)

    def _close(self, status: str) -> None:
        if self._owned and self.is_main and self.tracker is not None:
            self._owned = False  # set first, so that an interruption does not repeat the end
            try:
                if status != "FAILED":
                    self._conclude(self.tracker)
            finally:
                self.tracker.close(status)

    @staticmethod
    def _conclude(tracker: Tracker) -> None:
        """Write the report; a failure is a warning. The caller concludes a tracker of its own."""
        from mlflow_icr.reporting import conclude  # imported at the end: no measurement needs it

        if tracker.journal.rows:
            conclude(tracker)

    def __enter__(self) -> ICRWatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.finish()
        else:
            self.close(status_of(error))

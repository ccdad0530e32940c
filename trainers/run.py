"""A run: configuration, data, network and monitors put together, and the caller of the training loop."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from mlflow_icr import Denoiser, GenerationMonitor, ICRMonitor, LossMonitor, Report, geometric_schedule
from mlflow_icr.environment import environment_tags, thread_waiting
from mlflow_icr.extraction.encoders import load_encoder
from mlflow_icr.extraction.fitting import is_out_of_memory
from mlflow_icr.extraction.latents import LatentDenoiser
from mlflow_icr.extraction.views import as_unit_interval
from mlflow_icr.monitoring.generation_plots import trade_off
from mlflow_icr.monitoring.grid import image_tiles
from mlflow_icr.monitoring.neighbours import invariant_part, residual_part
from mlflow_icr.monitoring.ranking import rank_classes, rank_images
from mlflow_icr.monitoring.schedule import every_nth, looks_every
from mlflow_icr.monitoring.series import HISTORY, arrays_path, read_arrays, read_history
from mlflow_icr.monitoring.verdict import folded
from mlflow_icr.tracking import Tracker
from mlflow_icr.tracking.checkpoints.folder import checkpoint_path, mark_turning, part_of, remove_old
from trainers.agreement import Agreement, DivergedError, TrainingError
from trainers.checkpoint import (
    check_data,
    entire_tensors,
    is_saved,
    latest_checkpoint,
    load_checkpoint,
    named_tensors,
    not_finite,
    remove_between,
    save_checkpoint,
    save_shares,
)
from trainers.config import TrainConfig
from trainers.console import Console
from trainers.curve import Curve
from trainers.data import data_of, describe_data
from trainers.engine import bare, is_sharded
from trainers.families import family_of
from trainers.groups import STOP_VERDICTS
from trainers.inputs import inputs_of, open_autoencoder, with_measured
from trainers.loop import TrainState, new_state, take_mean_loss, train, whole_average

logger = logging.getLogger(__name__)

# Bytes of views that are kept: to encode them again would cost as much as many measurements.
VIEW_CACHE, LATENT_CACHE = 512 * 2**20, 4 * 2**30
PROJECTOR_IMAGES = 1000  # more make one sprite that browsers are slow with


def precision_of(config: TrainConfig) -> str:
    """The configuration's mixed precision, or the launcher's: `accelerate config` and `accelerate launch` set it."""
    return config.optimizer.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


class Run:
    """One training run, ready to go. Raises ValueError for data, layers or ranks that do not fit the configuration."""

    def __init__(self, config: TrainConfig, output_dir: Path, *, resume: bool = False) -> None:
        self.config, self.output_dir = config, output_dir
        if precision_of(config) == "fp16" and not torch.cuda.is_available():
            raise ValueError("mixed_precision is 'fp16'; expected no or bf16 where there is no CUDA device")
        self.accelerator = Accelerator(
            mixed_precision=precision_of(config),
            gradient_accumulation_steps=config.optimizer.gradient_accumulation_steps,
            cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available(),
            dynamo_backend="inductor" if config.optimizer.compile else None,
        )
        torch.backends.cudnn.benchmark = config.optimizer.cudnn_benchmark
        self._check_engine()
        self.autoencoder = open_autoencoder(config, self.accelerator.device)
        self.data = data_of(config)
        if self.is_main:
            for note in self.data.notes:
                logger.warning(note)
        self.inputs = inputs_of(config, self.data, self.autoencoder, self.accelerator.device)
        config = self.config = with_measured(config, self.inputs)
        self.family = family_of(config, self.data.num_classes)
        saved = latest_checkpoint(output_dir) if resume and config.network.init_from else None
        network = self.family.build(self.inputs.shape[0], self.inputs.shape[1:], start="" if saved is None else str(saved))
        self.num_parameters = sum(p.numel() for p in network.parameters())
        self.state = new_state(network, config, self.accelerator)
        ema = self._denoiser(self.state.ema)
        raw = self._denoiser(bare(self.state.network, self.accelerator)) if config.monitor.measure_raw else None
        heldout = self.data.heldout if len(self.data.heldout) else None
        self.monitor = ICRMonitor(
            ema,
            self.data.train,
            config.protocol(),
            raw=raw,
            companions=config.monitor.companions,
            labels=self.data.train_labels,
            pictures=True,
            batch_size=config.monitor.measure_batch,
            cache_bytes=(LATENT_CACHE if self.autoencoder else VIEW_CACHE),
            heldout=heldout,
            trained_before=bool(config.network.init_from),
            knows_labels=config.network.labels,
        )
        self.losses = None
        if heldout is not None:
            loss = partial(self.family.loss, self.family.denoiser(self.state.ema))
            size = config.monitor.measure_batch
            self.losses = LossMonitor(ema, loss, self.family.draw, self.data.train, heldout, batch_size=size)
        self.generation = GenerationMonitor(
            ema,
            self.data.train,
            heldout,
            encoder=load_encoder(
                config.monitor.encoder,
                weights=config.monitor.encoder_weights or None,
                shape=self.data.train.shape[1:],
                device=self.accelerator.device,
            ),
            num_samples=config.monitor.num_samples,
            num_steps=config.monitor.sample_steps,
            batch_size=config.monitor.sample_batch,
            labels=self.inputs.labels,
        )
        self.schedule = geometric_schedule(
            config.total_images,
            first=round(config.monitor.first_measurement_kimg * 1000),
            count=config.monitor.measurements,
            granularity=config.optimizer.batch_size,
        )
        every = looks_every(config.monitor.generate_every)
        self.generate_at = self.schedule[-1:] if every is None else every_nth(self.schedule, every)
        self.on_suspicion = every is None
        if resume:
            folder = latest_checkpoint(output_dir)
            if folder is not None:  # else the run ended before its first one, and starts again
                check_data(folder, config.data.source, self._data_sha256)
                self.monitor.load_state_dict(load_checkpoint(folder, self.state, self.accelerator, config.optimizer.batch_size))
        # The same on every rank; the measurement at the state that was saved is repeated.
        rows = read_history(output_dir) if resume and (output_dir / HISTORY).exists() else []
        self.measured_at = {int(row["images_seen"]) for row in rows}
        self.verdicts = folded(row for row in rows if row["images_seen"] < self.state.images_seen)
        self._trained_seconds, self._trained_images = 0.0, 0
        self.agreement = Agreement(self.accelerator, config.optimizer.learning_rate, config.run.save_every_minutes)
        if self.is_main and self.accelerator.device.type == "cpu" and thread_waiting() == "active":
            logger.warning("threads spin while they wait: another training on these cores would crawl; OMP_WAIT_POLICY=passive")

    def _denoiser(self, network: nn.Module) -> Denoiser:
        """A network as the monitors read it."""
        denoiser = self.family.denoiser(network)
        return denoiser if self.autoencoder is None else LatentDenoiser(denoiser, self.autoencoder)

    def _check_engine(self) -> None:
        self.config.check_ranks(self.accelerator.num_processes, self.accelerator.gradient_accumulation_steps)
        if self.config.monitor.measure_raw and self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("measure_raw is True; expected false with FSDP, where no rank has the trained weights whole")

    @property
    def _data_sha256(self) -> tuple[str, str]:
        return self.data.train_sha256, self.data.heldout_sha256

    @property
    def is_main(self) -> bool:
        """Whether this rank logs and saves."""
        return self.accelerator.is_main_process

    def params(self) -> dict[str, Any]:
        """The run's parameters, as trackers show them."""
        p = self.monitor.protocol
        return self.config.flat() | {
            "probe_images": p.num_images,
            "probe_views": p.num_views,
            "protocol_digest": p.digest,
            "data_sha256": self.data.train_sha256,
            "heldout_sha256": self.data.heldout_sha256,
            "encoder_sha256": self.generation.encoder.weights_sha256,
            "num_parameters": self.num_parameters,
            "feature_dim": self.monitor.dim,
            "probe_degrees_per_dimension": round(p.degrees_per_dimension(self.monitor.dim), 3),
            "world_size": self.accelerator.num_processes,
            "distributed_type": self.accelerator.distributed_type.value,
            "mixed_precision": self.accelerator.mixed_precision,
            "gradient_accumulation_steps": self.accelerator.gradient_accumulation_steps,
            "dynamo_backend": self.accelerator.state.dynamo_plugin.backend.value,
            "device": self.accelerator.device.type,
            "torch_version": torch.__version__,
            "threads": torch.get_num_threads(),
            "thread_waiting": thread_waiting(),
        }

    def tags(self) -> dict[str, str]:
        """The run's tags, as trackers show them: its environment, as `icr.*`, and the SHA-256 of its data."""
        return environment_tags() | {"icr.data_sha256": self.data.train_sha256, "icr.heldout_sha256": self.data.heldout_sha256}

    def show_data(self, tracker: Tracker) -> None:
        """Show training and held-out images as the run's datasets."""
        tracker.dataset(partial(describe_data, self.config, self.data.train, self.data.train_sha256), "training")
        if len(self.data.heldout):
            tracker.dataset(partial(describe_data, self.config, self.data.heldout, self.data.heldout_sha256), "validation")

    def measure(self, judged: bool) -> Report:
        """The report of the present state, with samples if they are to be judged or the verdict wants them; on every rank."""
        state, config, absent = self.state, self.config, {}
        step = state.images_seen
        values: dict[str, float] = {
            "train/optimizer_steps": state.optimizer_steps,
            "train/batch_size": config.optimizer.batch_size,
        }
        if state.origin_images_seen:
            values["train/origin_images_seen"] = state.origin_images_seen
        if skipped := int(state.skipped[0]):
            values["train/skipped_steps"] = skipped
        loss = take_mean_loss(self.state, self.accelerator)
        if loss is not None and math.isfinite(loss):
            values["loss/train"] = loss
        elif loss is not None:
            absent["loss/train"] = (
                f"a step's loss was {loss}; learning_rate is {config.optimizer.learning_rate:g}, expected a lower one"
            )
        if self._trained_images:
            values["perf/images_per_second"] = self._trained_images / self._trained_seconds
        self._trained_seconds, self._trained_images = 0.0, 0
        report = self.monitor.measure(step).joined(Report(step, values, absent=absent))
        if self.losses is not None:
            report = report.joined(self.losses.measure(step))
        verdict = self.verdicts.add(report.flat())
        if judged or (self.on_suspicion and verdict.wants_samples):
            samples = self.generation.measure(step)
            report, verdict = report.joined(samples), self.verdicts.add_samples(samples.flat())
        return report.joined(Report(step, verdict.forecast.values()))

    def train_to_end(self, tracker: Tracker | None, console: Console, wants_stop: Callable[[], bool]) -> str:
        """Train to the end of the schedule, or until asked to stop; returns FINISHED or KILLED. Raises TrainingError."""
        due, trained = [step for step in self.schedule if step >= self.state.images_seen], 0
        with closing(train(self.state, self.inputs, self.family, self.accelerator)) as steps, closing(self._curve(tracker)):
            self._start_clock()
            while due:
                if self.state.images_seen >= due[0]:  # above it where the batch size has changed
                    self._pause()
                    judged = False
                    while due and self.state.images_seen >= due[0]:
                        judged |= due.pop(0) in self.generate_at
                    self._observe(tracker, console, judged)
                    if self._verdict_reached():
                        console.stopped(self.verdicts.verdict)
                        return "FINISHED"
                    self._start_clock()
                    continue
                decision = self.agreement.ask(self.state, wants_stop(), trained)
                if decision.save or decision.stop:
                    self._pause()
                    self._save()
                    if decision.stop:
                        return "KILLED"
                    self._start_clock()
                self._step(steps)
                trained += 1
                console.step(self.state)
        if self.accelerator.scaler is None:
            self.agreement.refuse_divergence(int(self.state.skipped[1]), 1)  # the last state is not saved then
        return "FINISHED"

    def _curve(self, tracker: Tracker | None) -> Curve:
        """The training's curve, started at the present state."""
        config, log = self.config, None if tracker is None else tracker.log
        self.curve = Curve(config.run.curve_every, self.accelerator, log, skipped=int(self.state.skipped[0]))
        return self.curve

    def _step(self, steps: Iterator[TrainState]) -> None:
        try:
            next(steps)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size, parts = self.config.optimizer.batch_size, self.accelerator.gradient_accumulation_steps
            raise TrainingError(
                f"batch_size is {size}, of which a part of {size // parts} does not fit the memory; "
                "expected more parts (--gradient-accumulation-steps), or --gradient-checkpointing"
            ) from None
        self._trained_images += self.config.optimizer.batch_size
        self.curve.step(self.state)

    def _pause(self) -> None:
        """Stop the training's clock, after the queued work, and wait until the curve is logged."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self._trained_seconds += time.perf_counter() - self._since
        self.curve.flush()

    def _start_clock(self) -> None:
        self._since = time.perf_counter()
        self.curve.start_clock(self.state.images_seen)

    def _observe(self, tracker: Tracker | None, console: Console, judged: bool) -> None:
        """Save, then measure: a kill during a measurement costs no training, and a resumed run measures the same again."""
        self._save()
        with whole_average(self.state, self.accelerator):
            report = self.measure(judged)
        self.measured_at.add(report.step)
        if tracker is not None:
            tracker.record(report)
        console.measured(report)
        if self.is_main:
            mark_turning(self.output_dir, self.verdicts.verdict)
        if tracker is not None and checkpoint_path(self.output_dir, report.step).exists():
            tracker.checkpoint(report.step)
            remove_old(self.output_dir, self.config.run.checkpoints_total_limit, self.verdicts.may_be_kept)

    def _verdict_reached(self) -> bool:
        """Whether the verdict is the one to stop on, or past it."""
        if not self.config.monitor.stop_on:
            return False
        state = self.verdicts.verdict.state
        return state in STOP_VERDICTS[STOP_VERDICTS.index(self.config.monitor.stop_on) :]

    def _save(self) -> None:
        """Write a checkpoint, unless no training could resume from it; every rank takes part. Raises DivergedError on all."""
        self.agreement.saved()
        # No training resumes from weights that give no finite gradient; in fp16 the scaler's factor may be the cause.
        if self.accelerator.scaler is None and int(self.state.skipped[1]):
            return
        state, sharded, tensors = self.state, is_sharded(self.state.network), dict[str, torch.Tensor]()
        losses = self.accelerator.gather(state.loss_sum.reshape(1))
        curve = self.accelerator.reduce(state.curve.clone(), reduction="mean")
        if self.is_main or sharded:
            tensors = named_tensors(state, self.accelerator, self.monitor.state_dict(), losses, curve)
        problem = not_finite(tensors)
        saved_here = self.is_main and is_saved(self.output_dir, state.images_seen)
        flags = torch.tensor([float(bool(problem)), float(saved_here)], device=self.accelerator.device)
        broken, saved = self.accelerator.reduce(flags, reduction="sum").tolist()
        if broken:
            raise DivergedError(self.config.optimizer.learning_rate, f"{problem or 'a weight'} is not finite")
        if not saved:
            with whole_average(state, self.accelerator):
                self._write(tensors, sharded)
        if self.is_main:
            remove_between(self.output_dir, sorted(self.measured_at))
        self.accelerator.wait_for_everyone()

    def _write(self, tensors: dict[str, torch.Tensor], sharded: bool) -> None:
        """Write a checkpoint on the main process, and the shares of every rank where parameters are sharded."""
        shares = None
        if sharded:
            shares = {
                key: value for key, value in tensors.items() if key.startswith(("network/", "ema/", "optimizer/", "power/"))
            }
            kept = {key: value for key, value in tensors.items() if key not in shares or key.startswith("power/")}
            tensors = entire_tensors(kept)  # for the folder of the average, and its snapshots
        if self.is_main:
            entire = tensors if sharded else entire_tensors(tensors)
            save_checkpoint(
                self.output_dir, self.state, self.family, self.accelerator, entire, self.autoencoder, shares, self._data_sha256
            )
        elif shares is not None:
            folder = checkpoint_path(self.output_dir, self.state.images_seen)
            save_shares(part_of(folder), self.accelerator, shares)

    def conclude(self, tracker: Tracker) -> None:
        """Log the run's results: quality against copying, tables of images, vectors for the projector; on the main process."""
        if not tracker.journal.rows:
            return
        step = int(tracker.journal.rows[-1]["images_seen"])
        picture = trade_off(tracker.journal.rows, self.generation.encoder.name)
        if picture is not None:
            tracker.figure("trade_off", picture, step)
        if not arrays_path(self.output_dir, step).exists():  # the features were not finite
            return
        arrays = read_arrays(self.output_dir, step)
        if "repr/residual_share" in arrays:
            tracker.table("training_images", rank_images(arrays), step)
            tracker.table("classes", rank_classes(arrays), step)
        features, labels = self.monitor.features, self.monitor.labels
        if features is None:
            return
        features = features[:PROJECTOR_IMAGES]
        tiles = image_tiles((as_unit_interval(self.data.train[: len(features)]) * 255).round().to(torch.uint8))
        texts = [str(i) if labels is None else f"{i}: class {int(labels[i])}" for i in range(len(features))]
        for name, vectors in (("s", invariant_part(features)), ("xi", residual_part(features))):
            tracker.embedding(name, vectors.float().cpu().numpy(), tiles, texts, step)

    def end(self) -> None:
        """Leave the process group, if there is one."""
        self.accelerator.end_training()

"""Hooks that measure the network of a script which does not use this library.

A measurement is made just before the network sees the next batch in training mode. By then the script has done everything that
follows an optimizer step, such as updating its average. Nothing that the script sees is changed: not its weights, training
flags or random numbers.
"""

from __future__ import annotations

import argparse
import inspect
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from mlflow_icr.extraction import SchedulerDenoiser, keyed_generator
from mlflow_icr.extraction.images import read_images, with_channels
from mlflow_icr.integrations.accelerate import ICRTracker
from mlflow_icr.integrations.watch import ICRWatch
from mlflow_icr.integrations.weights import measured_network
from mlflow_icr.monitoring import GenerationMonitor, Protocol

IMAGES_SEEN = "icr_images_seen.json"  # beside what Accelerate saves of the script's state


def check_network(network: nn.Module) -> None:
    """Raise ValueError for a network with inputs other than pixels and a timestep."""
    name, config = type(network).__name__, getattr(network, "config", None)
    channels = getattr(config, "in_channels", None)
    if channels not in (1, 3) or not isinstance(getattr(config, "sample_size", None), int):
        raise ValueError(f"the network is a {name} with {channels} channels; expected one of square images, grey or RGB")
    required = [p.name for p in inspect.signature(type(network).forward).parameters.values() if p.default is p.empty]
    if required[1:3] != ["sample", "timestep"] or len(required) > 3 or getattr(config, "num_class_embeds", None):
        raise ValueError(f"the network is a {name} with conditions; expected one that sees an image and a timestep")


def images_for(network: Any, path: Path, seed: int) -> Tensor:
    """The images (N, C, side, side) uint8 at a path, as the network takes them, in an order fixed by the seed."""
    images = with_channels(read_images(path, network.config.sample_size).images, network.config.in_channels)
    return images[torch.from_numpy(keyed_generator("probe", seed).permutation(len(images)))].contiguous()


class ScriptHooks:
    """A context that watches the network that Accelerate prepares, with the options of the command.

    The images seen of an optimizer step are those of the training forward passes before it. What the script logs through
    Accelerate is tracked too, beside the trackers that it asks for.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        params = {"script": options.script.name}  # its flags may hold a token
        self.icr = ICRTracker(options.output_dir, run_name=options.run_name, params=params, resume=options.resume)
        self.accelerator: Any = None
        self.network: nn.Module | None = None
        self.scheduler: Any = None
        self.averages: list[weakref.ref[Any]] = []
        self.watch: ICRWatch | None = None
        self._begun_at = 0  # images seen before this process
        self._images = 0  # of this rank, since the last optimizer step
        self._stepped = False

    def __enter__(self) -> ScriptHooks:
        self._undo = ExitStack()
        self._wrap(Accelerator, "__init__", self._begin)
        self._wrap(Accelerator, "prepare", self._prepare)
        self._wrap(Accelerator, "backward", self._backward)
        self._wrap(Accelerator, "save_state", self._save_state)
        self._wrap(Accelerator, "load_state", self._load_state)
        self._wrap(Accelerator, "end_training", self._end)
        self._wrap(EMAModel, "__init__", self._average)
        for scheduler in (DDPMScheduler, DDIMScheduler):
            self._wrap(scheduler, "add_noise", self._add_noise)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _wrap(self, owner: type, name: str, hook: Callable[..., Any]) -> None:
        """Replace a method by `hook(original, self, ...)` until the context ends."""
        original = getattr(owner, name)

        @wraps(original)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            return hook(original, *args, **kwargs)

        self._undo.callback(setattr, owner, name, original)
        setattr(owner, name, hooked)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """End the program with one line, not with the script's traceback, for bad input."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise SystemExit(f"mlflow_icr.integrations.diffusers: error: {error}") from error

    def _begin(self, original: Any, accelerator: Any, *args: Any, **kwargs: Any) -> None:
        if self.accelerator is None:
            self.accelerator = accelerator
            bound = inspect.signature(original).bind(accelerator, *args, **kwargs)
            trackers = bound.arguments.get("log_with")
            trackers = [] if trackers is None else list(trackers) if isinstance(trackers, (list, tuple)) else [trackers]
            bound.arguments["log_with"] = [*trackers, self.icr]
            original(*bound.args, **bound.kwargs)
        else:
            original(accelerator, *args, **kwargs)

    def _prepare(self, original: Any, accelerator: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = original(accelerator, *args, **kwargs)
        if self.network is None:
            for entry in prepared if isinstance(prepared, (list, tuple)) else [prepared]:
                if isinstance(entry, nn.Module) and any(p.requires_grad for p in entry.parameters()):
                    network = accelerator.unwrap_model(entry)
                    with self._refusing():
                        check_network(network)
                        self.images = images_for(network, self.options.data, self.options.seed)
                    self.network = network
                    network.register_forward_pre_hook(self._before_forward, with_kwargs=True)
                    break
        return prepared

    def _average(self, original: Any, average: Any, *args: Any, **kwargs: Any) -> None:
        original(average, *args, **kwargs)
        self.averages.append(weakref.ref(average))

    def _add_noise(self, original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        self.scheduler = scheduler
        return original(scheduler, *args, **kwargs)

    def _backward(self, original: Any, accelerator: Any, *args: Any, **kwargs: Any) -> None:
        original(accelerator, *args, **kwargs)
        self._stepped = self._stepped or accelerator.sync_gradients
        if accelerator.sync_gradients and self.icr.images_per_step is None:  # before the script logs this step
            self.icr.images_per_step = self._images * accelerator.num_processes

    def _save_state(self, original: Any, accelerator: Any, *args: Any, **kwargs: Any) -> Any:
        folder = original(accelerator, *args, **kwargs)
        if folder is not None and self.watch is not None and accelerator.is_main_process:
            # Each other rank has as many new images as this one.
            images_seen = self.watch.images_seen + (self.watch.pending + self._images) * accelerator.num_processes
            (Path(folder) / IMAGES_SEEN).write_text(json.dumps({"images_seen": images_seen}))
        return folder

    def _load_state(self, original: Any, accelerator: Any, input_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = original(accelerator, input_dir, *args, **kwargs)
        path = None if input_dir is None else Path(input_dir) / IMAGES_SEEN
        if path is not None and path.exists():
            self._begun_at = int(json.loads(path.read_text())["images_seen"])
        return result

    def _end(self, original: Any, accelerator: Any, *args: Any, **kwargs: Any) -> None:
        if self.watch is not None:
            self.watch.pending += self._images
            self._images = 0
            self.watch.finish()
            self._keep(always=self.watch.stops)
        original(accelerator, *args, **kwargs)

    def _before_forward(self, network: nn.Module, args: Any, kwargs: Any) -> None:
        if not (torch.is_grad_enabled() and network.training):
            return  # sampling, or a measurement
        if self.watch is None:
            with self._refusing():
                self.watch = self._watch_on(network)
            self.watch(self._begun_at)
            self._keep()
        elif self._stepped:
            self._step(self.watch)
        self._images += len(args[0] if args else kwargs["sample"])

    def _step(self, watch: ICRWatch) -> None:
        """After an optimizer step: count its images, measure if it is due, and stop if the verdict says so."""
        count, self._images, self._stepped = self._images, 0, False
        stops = watch.add(count)
        self._keep()
        if stops:
            self.accelerator.end_training()
            raise SystemExit(0)

    def _watch_on(self, network: nn.Module) -> ICRWatch:
        o = self.options
        if self.scheduler is None:
            raise ValueError("the script added no noise by a DDPMScheduler or DDIMScheduler; expected one of them")
        average = self._average_of(network)
        measured, refresh = measured_network(network, average)
        learned = getattr(network.config, "time_embedding_type", None) == "learned"
        denoiser = SchedulerDenoiser(measured, self.scheduler, nearest=learned)
        images = self.images
        generation = None
        if o.num_samples:
            generation = GenerationMonitor(denoiser, images, num_samples=o.num_samples, seed=o.seed)
        count = min(o.num_images, len(images))
        return ICRWatch(
            denoiser,
            images,
            o.output_dir,
            schedule=o.at if o.every is None else o.every,
            protocol=Protocol(layer=o.layer, sigmas=o.sigma, num_images=count, seed=o.seed),
            generation=generation,
            generate_every=o.generate_every,
            stop_on=o.stop_on,
            refresh=refresh,
            params={
                "weights": "raw" if average is None else "average",
                "prediction_type": denoiser.prediction_type,
                "images": len(images),
            },
            resume=o.resume,
            images_seen=self._begun_at,
            tracker=self.icr.tracker if self.accelerator.is_main_process else None,
        )

    def _average_of(self, network: nn.Module) -> Any:
        """The first EMAModel of the script whose parameters have the network's shapes; None without one."""
        shapes = [p.shape for p in network.parameters()]
        alive = (average() for average in self.averages)
        return next((a for a in alive if a is not None and [p.shape for p in a.shadow_params] == shapes), None)

    def _keep(self, *, always: bool = False) -> None:
        """Save the weights of the last measurement, with --save."""
        assert self.watch is not None
        at = self.watch.measured_at
        folder = self.options.output_dir / "checkpoints" / f"{at or 0:012d}"
        if at != self.watch.images_seen or not (always or self.options.save) or not self.accelerator.is_main_process:
            return
        if not folder.exists():
            DDPMPipeline(self.watch.denoiser.network, self.scheduler).save_pretrained(folder)

    def close(self, status: str) -> None:
        """End the run with a status, if the script has not ended it."""
        if self.accelerator is not None and self.accelerator.is_main_process:
            self.icr.close(status)

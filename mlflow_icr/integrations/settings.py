"""The arguments of the trainers' callbacks: what is measured and when. The watch is made when training starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from mlflow_icr.extraction.denoisers import Denoiser
from mlflow_icr.integrations.watch import ICRWatch, check_stop_on
from mlflow_icr.integrations.weights import Where, bare, find, measured_network
from mlflow_icr.monitoring import GenerationMonitor, Protocol
from mlflow_icr.monitoring.schedule import SUSPICION, looks_every, measuring_steps
from mlflow_icr.tracking import Tracker


@dataclass(frozen=True, eq=False)
class WatchSettings:
    """The arguments of a callback, checked when it is made: which network of the module is measured, how and when.

    `denoiser` makes a Denoiser from a network, such as `EDMDenoiser` or `lambda n: SchedulerDenoiser(n, scheduler)`. `network`
    and `ema` say where in the module the network and its average are: a path of attributes, or a function of the module. The
    average may be a module, an AveragedModel or diffusers' EMAModel. `images` are (N, C, H, W), uint8 or floats in [0, 1].
    `num_samples` samples are looked at every `generate_every` measurements, against `heldout` images too. The rest is as in
    ICRWatch. Raises ValueError for an impossible schedule, `stop_on`, `num_samples` or `generate_every`.
    """

    denoiser: Callable[[nn.Module], Denoiser]
    images: Tensor
    output_dir: Path | str
    network: Where = ""
    ema: Where | None = None
    schedule: int | Iterable[int] | None = None
    protocol: Protocol | None = None
    num_samples: int = 0
    generate_every: int | str = SUSPICION
    heldout: Tensor | None = None
    labels: Tensor | None = None
    stop_on: str = ""
    params: Mapping[str, object] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    run_name: str | None = None

    def __post_init__(self) -> None:
        check_stop_on(self.stop_on)
        if self.num_samples < 0:
            raise ValueError(f"num_samples is {self.num_samples}; expected 0 for none, or more")
        if self.schedule is not None and not isinstance(self.schedule, int):
            object.__setattr__(self, "schedule", tuple(self.schedule))  # the check would exhaust an iterator
        measuring_steps(self.schedule)
        looks_every(self.generate_every)

    def watch(
        self,
        module: nn.Module,
        *,
        images_seen: int = 0,
        resume: bool = False,
        params: Mapping[str, object] | None = None,
        tracker: Tracker | None = None,
    ) -> ICRWatch:
        """The watch on a module's network, or on its average that `ema` names. Raises ValueError if there is none."""
        network = bare(find(module, self.network, "network"), "network")
        average = None if self.ema is None else find(module, self.ema, "ema")
        measured, refresh = measured_network(network, average)
        denoiser = self.denoiser(measured)
        generation = None
        if self.num_samples:
            generation = GenerationMonitor(denoiser, self.images, self.heldout, num_samples=self.num_samples)
        return ICRWatch(
            denoiser,
            self.images,
            self.output_dir,
            schedule=self.schedule,
            protocol=self.protocol,
            generation=generation,
            generate_every=self.generate_every,
            stop_on=self.stop_on,
            refresh=refresh,
            labels=self.labels,
            params={"weights": "raw" if average is None else "average", **(params or {}), **self.params},
            tags=self.tags,
            run_name=self.run_name,
            resume=resume,
            images_seen=images_seen,
            tracker=tracker,
        )

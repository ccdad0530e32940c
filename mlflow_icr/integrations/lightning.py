"""Lightning: `Trainer(callbacks=[ICRCallback(...)])`, of the package `lightning` or `pytorch_lightning`."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from mlflow_icr.integrations.settings import WatchSettings
from mlflow_icr.integrations.watch import ICRWatch
from mlflow_icr.tracking.ending import status_of


def _lightning() -> Any:
    """The package whose Trainer is in use: the imported one, else the installed one. Raises ImportError."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in {"lightning", *names}:
                raise
    raise ImportError("neither lightning nor pytorch_lightning is installed; expected one: pip install 'mlflow-icr[lightning]'")


def count_images(batch: Any) -> int:
    """The length of the first tensor of a batch, which may be in lists and dicts. Raises ValueError where there is none."""
    stack = [batch]
    while stack:
        entry = stack.pop(0)
        if isinstance(entry, torch.Tensor) and entry.ndim:
            return len(entry)
        if isinstance(entry, dict):
            stack = [*entry.values(), *stack]
        elif isinstance(entry, (list, tuple)):
            stack = [*entry, *stack]
    raise ValueError(f"the batch is a {type(batch).__name__} without a tensor; expected one to count its images")


class ICRCallback(_lightning().Callback):  # type: ignore[misc]
    """Measures a LightningModule's network while Lightning trains it; arguments are those of WatchSettings.

    Without `ema`, the average of a WeightAveraging callback is measured where the trainer has one (list it before this one),
    else the network itself. Training stops with the batch after which the verdict is that of `stop_on`. Resumed from a
    checkpoint (`ckpt_path`), it continues in the folder and in its MLflow run. An exception leaves the run FAILED, Ctrl-C
    KILLED.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.settings = WatchSettings(*args, **kwargs)
        self.watch: ICRWatch | None = None
        self._images_seen = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the run, and measure the network as it is."""
        params = {"trainer": "lightning", "max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
        # A private name, since WeightAveraging came in 2.6: there is no public one.
        averages = (getattr(callback, "_average_model", None) for callback in trainer.callbacks)
        average = next((model.module for model in averages if model is not None), None)
        if average is not None and self.settings.ema is None:
            pl_module = average
            params["weights"] = "average"
        resume = trainer.global_step > 0
        self.watch = self.settings.watch(pl_module, images_seen=self._images_seen, resume=resume, params=params)
        self.watch(self._images_seen)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch's images, measure if it is due, and stop if the verdict says so."""
        assert self.watch is not None
        if self.watch.add(count_images(batch)):
            trainer.should_stop = True
        self._images_seen = self.watch.images_seen

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure where training ended, and end the run."""
        if self.watch is not None:
            self.watch.finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End the run as FAILED or KILLED."""
        if self.watch is not None:
            self.watch.close(status_of(exception))

    def state_dict(self) -> dict[str, Any]:
        """The state in a checkpoint: images seen."""
        return {"images_seen": self._images_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._images_seen = int(state_dict["images_seen"])

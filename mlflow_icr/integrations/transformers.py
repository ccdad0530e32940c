"""transformers: `Trainer(callbacks=[ICRCallback(...)])` for a model whose `forward` computes a diffusion loss."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mlflow_icr.integrations.settings import WatchSettings
from mlflow_icr.integrations.watch import ICRWatch


class ICRCallback(TrainerCallback):  # type: ignore[misc]
    """Measures a model's network while transformers' Trainer trains it; arguments are those of WatchSettings.

    Images seen are optimizer steps times images in one, as the Trainer counts them: ranks times batch times accumulation.
    Training stops with the step after which the verdict is that of `stop_on`. Resumed from a checkpoint, it continues in the
    folder and in its MLflow run. The Trainer has no callback for exceptions: one that ends the program leaves the run FAILED,
    Ctrl-C KILLED; where it is caught, call `callback.close("FAILED")`. The Trainer's own MLflowCallback shares the run.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.settings = WatchSettings(*args, **kwargs)
        self.watch: ICRWatch | None = None

    @staticmethod
    def _images_per_step(args: TrainingArguments) -> int:
        return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Begin the run, and measure the network as it is."""
        images_seen = state.global_step * self._images_per_step(args)
        params = {"trainer": "transformers", "max_steps": state.max_steps, "images_per_step": self._images_per_step(args)}
        self.watch = self.settings.watch(model, images_seen=images_seen, resume=state.global_step > 0, params=params)
        self.watch(images_seen)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if it is due, and stop if the verdict says so."""
        assert self.watch is not None
        if self.watch(state.global_step * self._images_per_step(args)):
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure where training ended, and end the run."""
        if self.watch is not None:
            self.watch.finish()

    def close(self, status: str) -> None:
        """End the run with a status, FINISHED, FAILED or KILLED. Does nothing the second time."""
        if self.watch is not None:
            self.watch.close(status)

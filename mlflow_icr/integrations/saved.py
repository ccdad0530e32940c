"""The saved checkpoints of a training, by images seen, and a network that loads the weights of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from mlflow_icr.extraction.denoisers import Denoiser
from mlflow_icr.extraction.pipelines import INDEX, SCHEDULER, load_network, load_pipeline
from mlflow_icr.integrations.adapter_weights import LoraLoader, PeftLoader
from mlflow_icr.integrations.checkpoint_files import (
    LORA,
    CheckpointFiles,
    Kind,
    Position,
    changed_at,
    entries_of,
)
from mlflow_icr.integrations.single_file import network_in_file

Echo = Callable[[str], None]


def _echo_nothing(text: str) -> None:
    """Print nothing."""


@dataclass(frozen=True)
class Units:
    """Images of an optimizer step, and of an epoch (None if unknown).

    Raises ValueError for numbers below 1.
    """

    images_per_step: int = 1
    images_per_epoch: int | None = None

    def __post_init__(self) -> None:
        for name in ("images_per_step", "images_per_epoch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")

    def images_seen(self, position: Position) -> int:
        """Images seen at a position. Raises ValueError for one in epochs if their images are not known."""
        if not position.in_epochs:
            return position.count * self.images_per_step
        if self.images_per_epoch is None:
            raise ValueError("its name counts epochs; expected images_per_epoch to be given")
        return position.count * self.images_per_epoch


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint and its images seen (or steps, if the batch is unknown)."""

    step: int
    files: CheckpointFiles

    @property
    def name(self) -> str:
        """The name of its folder or file."""
        return self.files.path.name

    @property
    def time(self) -> float:
        """Time of change of the newest weights file, in Unix seconds. Raises OSError if it was removed."""
        return changed_at(self.files)


def find_checkpoints(
    folder: Path, units: Units | None = None, echo: Echo = _echo_nothing, left_out: dict[str, str] | None = None
) -> list[SavedCheckpoint]:
    """The checkpoints in a folder by ascending images seen; `echo` gets a line for each name that is left out.

    `left_out` gets the reason for each checkpoint with damaged weights instead, by its name. Layouts are those of
    `checkpoint_files`. If the folder holds none, its `checkpoints/` is searched. Raises ValueError if there are none, or two of
    one step.
    """
    units = units or Units()
    if not folder.is_dir():
        raise ValueError(f"checkpoints is {str(folder)!r}, which is no folder")
    by_step: dict[int, SavedCheckpoint] = {}
    for entry in entries_of(folder):
        if entry.checkpoint is None:
            if entry.damaged and left_out is not None:
                left_out[entry.path.name] = entry.reason
            else:
                echo(f"{entry.path.name} is left out: {entry.reason}")
            continue
        step = units.images_seen(entry.checkpoint.position)
        if step in by_step:
            raise ValueError(
                f"checkpoints is {str(folder)!r}, where {by_step[step].name} and {entry.path.name} are of one step"
            )
        by_step[step] = SavedCheckpoint(step, entry.checkpoint)
    if not by_step:
        inner = folder / "checkpoints"
        if inner.is_dir():
            return find_checkpoints(inner, units, echo, left_out)
        raise ValueError(
            f"checkpoints is {str(folder)!r}, which holds no folder or file with a number and weights; expected such as "
            f"000000131072/unet, checkpoint-500/unet, checkpoint-500/{LORA} or name-step00000500.safetensors"
        )
    return [by_step[step] for step in sorted(by_step)]


def place_of(checkpoint: CheckpointFiles) -> Path:
    """The pipeline in a checkpoint's folder, or in the one above. Raises ValueError where there is none."""
    for folder in (checkpoint.path, checkpoint.path.parent):
        if (folder / INDEX).is_file() or ((folder / "unet" / "config.json").is_file() and (folder / SCHEDULER).is_file()):
            return folder
    raise ValueError(
        f"pipeline is not given, and neither {str(checkpoint.path)!r} nor the folder above is one; expected the pipeline that "
        "the training began with"
    )


class SavedTraining:
    """The denoiser of a training, with the weights of the checkpoint that was loaded last.

    Scheduler, autoencoder and text encoders come from `pipeline` (a folder, or a name on the hub), and so do the first weights.
    `options` are those of `load_pipeline`.
    """

    def __init__(self, pipeline: Path | str, **options: Any) -> None:
        self.denoiser: Denoiser
        self.denoiser, self.side, self._pipeline = load_pipeline(pipeline, **options)
        self._lora, self._peft = LoraLoader(self._pipeline), PeftLoader()

    def load(self, files: CheckpointFiles) -> None:
        """Load a checkpoint's weights. Raises ValueError for weights that cannot be read, or do not fit the network."""
        network: Any = self.denoiser.network
        match files.kind:
            case Kind.LORA:
                self._lora.load(files.weights, network)
            case Kind.PEFT:
                self._peft.load(files.weights, network)
            case Kind.NETWORK:
                self._take(load_network(files.weights))
            case Kind.FILE:
                self._take(network_in_file(files.weights, network))
        network.requires_grad_(False)

    def _take(self, source: Any) -> None:
        network = self.denoiser.network
        if self._lora.loaded or self._peft.loaded:
            raise ValueError("it is a whole network, and others are adapters; expected one kind in a folder")
        try:
            if type(source) is not type(network):
                raise RuntimeError(f"it is a {type(source).__name__}")
            network.load_state_dict(source.state_dict())
        except (RuntimeError, NotImplementedError) as error:
            why = shorten(str(error), 200, placeholder=" ...")
            raise ValueError(f"its network is not the {type(network).__name__} of the others ({why})") from None

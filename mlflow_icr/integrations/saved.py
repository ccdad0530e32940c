"""What a training has saved on its way: its checkpoints by their step, and each one's weights in one and the same network."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mlflow_icr.extraction.denoisers import Denoiser
from mlflow_icr.extraction.pipelines import INDEX, SCHEDULER, load_network, load_pipeline

# In this order: the average is what one samples from.
NETWORKS = ("unet_ema", "unet", "transformer_ema", "transformer")
LORA = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class SavedCheckpoint:
    """A numbered folder, its step, and its weights: a folder of diffusers' network, or a file of a LoRA."""

    step: int
    folder: Path
    weights: Path

    @property
    def time(self) -> float:
        """When the newest file of the weights was written, in seconds."""
        files = [self.weights] if self.weights.is_file() else [path for path in self.weights.rglob("*") if path.is_file()]
        return max(path.stat().st_mtime for path in files)


def _weights(folder: Path) -> Path | None:
    networks = (folder / name for name in NETWORKS)
    found = next((path for path in networks if (path / "config.json").is_file()), None)
    return folder / LORA if found is None and (folder / LORA).is_file() else found


def find_checkpoints(
    folder: Path, images_per_step: int = 1, say: Callable[[str], None] = lambda text: None
) -> list[SavedCheckpoint]:
    """The checkpoints in a folder by ascending step: folders whose name ends in a number, with a network or a LoRA in them.

    That is what the trainers here leave in `checkpoints/`, and diffusers' training scripts as `checkpoint-<step>/`. The step is
    the number times `images_per_step`. `say` hears of numbered folders without weights. Raises ValueError where there are none,
    or two of one step.
    """
    if images_per_step < 1:
        raise ValueError(f"images_per_step is {images_per_step}; expected at least 1")
    if not folder.is_dir():
        raise ValueError(f"checkpoints is {str(folder)!r}, which is no folder")
    found: dict[int, SavedCheckpoint] = {}
    for path in sorted(folder.iterdir()):
        number = re.search(r"(\d+)$", path.name)
        if number is None or not path.is_dir():
            continue
        weights = _weights(path)
        if weights is None:
            say(f"{path.name} is left out: it holds neither {', '.join(NETWORKS)} nor {LORA}")
            continue
        step = int(number[1]) * images_per_step
        if step in found:
            raise ValueError(f"checkpoints is {str(folder)!r}, where {found[step].folder.name} and {path.name} are of one step")
        found[step] = SavedCheckpoint(step, path, weights)
    if not found:
        inner = folder / "checkpoints"
        if inner.is_dir():
            return find_checkpoints(inner, images_per_step, say)
        raise ValueError(
            f"checkpoints is {str(folder)!r}, which holds no folder with a number and weights; expected such as "
            f"000000131072/unet, checkpoint-500/unet or checkpoint-500/{LORA}"
        )
    return [found[step] for step in sorted(found)]


class SavedTraining:
    """The denoiser of a training, whose weights are those of the checkpoint that was loaded last.

    What is no weights, such as scheduler, autoencoder and text encoders, comes from `pipeline` (a folder, or a name on the
    hub), or else from the first checkpoint or the folder above it, where that is a pipeline. `options` are those of
    `load_pipeline`. Raises ValueError where there is no pipeline.
    """

    def __init__(self, checkpoints: list[SavedCheckpoint], pipeline: Path | str | None = None, **options: Any) -> None:
        self.checkpoints = checkpoints
        place = self._place() if pipeline is None else pipeline
        self.denoiser: Denoiser
        self.denoiser, self.side, self._pipeline = load_pipeline(place, **options)

    def _place(self) -> Path:
        first = self.checkpoints[0].folder
        for folder in (first, first.parent):
            if (folder / INDEX).is_file() or ((folder / "unet" / "config.json").is_file() and (folder / SCHEDULER).is_file()):
                return folder
        raise ValueError(
            f"pipeline is not given, and neither {str(first)!r} nor the folder above is one; expected the pipeline that the "
            "training began with"
        )

    def load(self, checkpoint: SavedCheckpoint) -> None:
        """Take a checkpoint's weights. Raises ValueError for weights that cannot be read, or do not fit the network."""
        if checkpoint.weights.is_file():
            self._load_lora(checkpoint)
            return
        network = self.denoiser.network
        found = load_network(checkpoint.weights)
        try:
            if type(found) is not type(network):
                raise RuntimeError(f"it is a {type(found).__name__}")
            network.load_state_dict(found.state_dict())
        except RuntimeError as error:
            why = shorten(str(error), 200, placeholder=" ...")
            raise ValueError(f"its network is not the {type(network).__name__} of the others ({why})") from None

    def _load_lora(self, checkpoint: SavedCheckpoint) -> None:
        if not hasattr(self._pipeline, "load_lora_weights"):
            raise ValueError("it is a LoRA; expected pipeline to be one of text and images, which takes it")
        with tempfile.TemporaryDirectory() as scratch:
            folder = _without_text_encoder(checkpoint.weights, Path(scratch))
            # It says of each LoRA that the text encoder, which is not there any more, gets nothing of it.
            logger = logging.getLogger("diffusers.loaders.lora_base")
            disabled, logger.disabled = logger.disabled, True
            try:
                self._pipeline.unload_lora_weights()
                self._pipeline.load_lora_weights(folder, weight_name=LORA, use_safetensors=True, adapter_name="measured")
            except (OSError, ValueError, RuntimeError, ImportError) as error:
                why = shorten(str(error), 200, placeholder=" ...")
                raise ValueError(f"{LORA} does not fit the pipeline, or the package peft is not there ({why})") from None
            finally:
                logger.disabled = disabled
        self.denoiser.network.requires_grad_(False)


def _without_text_encoder(path: Path, scratch: Path) -> Path:
    """The folder of a LoRA of the network alone: a part for the text encoder moves prompts, and none is read here.

    Raises ValueError for a file that is no safetensors.
    """
    try:
        with safe_open(path, "pt") as file:
            mine = [key for key in file.keys() if not key.startswith("text_encoder")]  # noqa: SIM118 - not a mapping
            if len(mine) == len(list(file.keys())):
                return path.parent
            # The scale of the LoRA may be in the metadata.
            save_file({key: file.get_tensor(key) for key in mine}, scratch / LORA, file.metadata())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{LORA} cannot be read ({type(error).__name__}: {error})") from None
    return scratch

"""Load low-rank adapters into a network: LoRA files by diffusers, PEFT's folders by PEFT."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mlflow_icr.integrations.checkpoint_files import PEFT_WEIGHTS

NAME = "measured"  # of the adapter, in the network
# A part for the text encoder is ignored: prompts were embedded once, at the start, and text encoders are not kept.
TEXT = ("text_encoder", "lora_te", "bundle_emb")
DOWN = ("lora_down", "lora_A", ".lora.down")  # one key in each adapted layer, by format
PEFT_PREFIX = "base_model.model."


def _line(error: Exception) -> str:
    return shorten(str(error) or type(error).__name__, 200, placeholder=" ...")


def _adapted(network: nn.Module) -> int:
    """The number of layers of a network that have the adapter."""
    return sum(f"lora_A.{NAME}." in name for name, _ in network.named_parameters())


class LoraLoader:
    """Loads LoRA files in kohya's, PEFT's and diffusers' formats into a pipeline, by its `load_lora_weights`."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.loaded = False

    def load(self, path: Path, network: nn.Module) -> None:
        """Load a file in place of the former one. Raises ValueError for a file that the pipeline cannot use completely."""
        if not hasattr(self._pipeline, "load_lora_weights"):
            raise ValueError("it is a LoRA; expected pipeline to be one of text and images, which takes it")
        with tempfile.TemporaryDirectory() as scratch:
            lora, layers = _network_part(path, Path(scratch))
            # diffusers logs for each LoRA that nothing is loaded into the text encoder, which is not kept.
            logger = logging.getLogger("diffusers.loaders.lora_base")
            disabled, logger.disabled = logger.disabled, True
            try:
                if self.loaded:
                    self._pipeline.unload_lora_weights()
                self._pipeline.load_lora_weights(lora.parent, weight_name=lora.name, use_safetensors=True, adapter_name=NAME)
            except Exception as error:  # diffusers' converters raise many kinds of exceptions for files that they do not know
                why = f"does not fit the pipeline, or the package peft is not there ({_line(error)})"
                raise ValueError(f"{path.name} {why}") from None
            finally:
                logger.disabled = disabled
                self.loaded = _adapted(network) > 0
        if (adapted := _adapted(network)) < layers:  # diffusers ignores layers that it does not know
            raise ValueError(
                f"{path.name} adapts {layers} layers, of which diffusers knows {adapted} in this pipeline's network"
            )


def _network_part(path: Path, scratch: Path) -> tuple[Path, int]:
    """The file of a LoRA of the network alone, and how many layers it adapts. Raises ValueError for a file that is none."""
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
            if any("dora_scale" in key for key in keys):
                raise ValueError(f"{path.name} is a DoRA, whose magnitudes diffusers leaves aside; expected a plain LoRA")
            network_keys = [key for key in keys if not key.startswith(TEXT)]
            layers = sum(any(part in key for part in DOWN) for key in network_keys)
            if layers == 0:
                raise ValueError(f"{path.name} adapts no layer of the network by a LoRA")
            if len(network_keys) == len(keys):
                return path, layers
            # The scale of the LoRA may be in the metadata.
            save_file({key: file.get_tensor(key) for key in network_keys}, scratch / path.name, file.metadata())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} cannot be read ({type(error).__name__}: {error})") from None
    return scratch / path.name, layers


class PeftLoader:
    """Loads folders of PEFT adapters (`adapter_config.json`, `adapter_model.safetensors`) into the network they are for."""

    def __init__(self) -> None:
        self.loaded = False

    def load(self, folder: Path, network: nn.Module) -> None:
        """Load an adapter in place of the former one. Raises ValueError for one that does not fit the network."""
        try:
            from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
        except ImportError:
            raise ValueError("it is a PEFT adapter, which needs peft: pip install 'mlflow-icr[lora]'") from None
        try:
            tensors = load_file(folder / PEFT_WEIGHTS)
            if not self.loaded:
                inject_adapter_in_model(PeftConfig.from_pretrained(str(folder)), network, adapter_name=NAME)
                device = next(network.parameters()).device
                network.to(device).eval()
                self.loaded = True
            plain = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
            result: Any = set_peft_model_state_dict(network, plain, adapter_name=NAME)
            unexpected = result.unexpected_keys
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"its adapter does not fit the network ({_line(error)})") from None
        layers = sum("lora_A" in key for key in plain)
        if unexpected or layers == 0 or _adapted(network) < layers:
            raise ValueError(f"its adapter has layers that the network does not have: {', '.join(unexpected[:3]) or 'all'}")

"""A network in one safetensors file, with diffusers' tensor names or with the original ones, which diffusers converts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import safe_open

PREFIXES = ("", "unet.", "transformer.", "model.")  # of a network's names in a file in diffusers' own names


def network_in_file(path: Path, like: Any) -> Any:
    """A network of the class and the config of another, in float32, with the weights in a file.

    The file of a whole pipeline will do; its text encoders and autoencoder are not read. Raises ValueError for another kind of
    file or network.
    """
    kind = type(like)
    try:
        tensors = _in_own_names(path, like)
        if tensors is not None:
            with torch.random.fork_rng(devices=[]):  # initial weights, which are replaced, are drawn at random
                network = kind.from_config(like.config)
            network.load_state_dict(tensors)
            return network
        if not hasattr(kind, "from_single_file"):
            raise ValueError(f"its tensors are not those of the {kind.__name__}, and diffusers converts no others to it")
        # The config is the network's own: diffusers would download the config of the model that it takes the file for.
        with tempfile.TemporaryDirectory() as config:
            like.save_config(config)
            return kind.from_single_file(str(path), config=config, local_files_only=True)
    except Exception as error:  # diffusers' converters raise many kinds of exceptions for files that they do not know
        why = shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
        raise ValueError(f"{path.name} is not read as the weights of a {kind.__name__} ({why})") from None


def _in_own_names(path: Path, like: Any) -> dict[str, Any] | None:
    """The tensors of a file with all of diffusers' tensor names of the network, with or without a prefix; else None."""
    names = set(like.state_dict())
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        for prefix in PREFIXES:
            if all(prefix + name in keys for name in names):
                return {name: file.get_tensor(prefix + name) for name in names}
    return None

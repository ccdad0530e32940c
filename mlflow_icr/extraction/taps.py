"""Taps: read one layer's mean-pooled output and leave the forward pass as soon as it is there."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mlflow_icr.extraction.denoisers import evaluating

ALIASES = "mid, mid-1, mid+1, ..., decoder"


class _Reached(Exception):  # noqa: N818 - not an error
    """Ends the forward pass at the tapped layer; never leaves this module."""


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel and torch.compile, whose hooks always fire."""
    while True:
        inner = getattr(network, "_orig_mod", None)
        if inner is None and isinstance(network, nn.parallel.DistributedDataParallel):
            inner = network.module
        if inner is None:
            return network
        network = inner


def _stages(network: nn.Module) -> tuple[list[str], int, int] | None:
    """The network's blocks in the order of the data, and the places in it that `mid` and `decoder` mean."""
    blocks = getattr(network, "transformer_blocks", None)
    if isinstance(blocks, nn.ModuleList) and len(blocks):
        middle = len(blocks) // 2  # block 14 of SiT-XL/2's 28, the paper's choice
        return [f"transformer_blocks.{i}" for i in range(len(blocks))], middle, middle
    down, up = getattr(network, "down_blocks", None), getattr(network, "up_blocks", None)
    if isinstance(down, nn.ModuleList) and isinstance(up, nn.ModuleList) and getattr(network, "mid_block", None) is not None:
        stages = [f"down_blocks.{i}" for i in range(len(down))] + ["mid_block"] + [f"up_blocks.{i}" for i in range(len(up))]
        return stages, len(down), len(down) + 1
    return None


def resolve_layer(network: nn.Module, layer: str) -> str:
    """The module path that `layer` means in a network: a path itself, or one of the aliases mid, mid+1, mid-1, decoder.

    `decoder` is the first block after a U-Net's bottleneck, and the middle block of a transformer.
    Raises ValueError, with the layers there are, when nothing of that name exists.
    """
    network = unwrap(network)
    paths = [name for name, _ in network.named_modules() if name]
    if layer in paths:
        return layer
    stages = _stages(network)
    if stages is not None:
        names, middle, decoder = stages
        place: int | None = None
        if layer == "decoder":
            place = decoder
        elif layer == "mid":
            place = middle
        elif layer.startswith(("mid+", "mid-")) and layer[4:].isdigit():
            place = middle + int(layer[3:])
        if place is not None and 0 <= place < len(names):
            return names[place]
    shown = names if stages is not None else [p for p in paths if p.count(".") <= 1]
    known = (f"aliases {ALIASES} (over " if stages is not None else "module paths (such as ") + ", ".join(shown[:40]) + ")"
    close = difflib.get_close_matches(layer, paths, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"layer is {layer!r}, which {type(network).__name__} does not have{hint}; it has {known}")


def pool(output: Any) -> Tensor:
    """Features (B, D) from a layer's output: the mean over space of (B, C, H, W), over tokens of (B, T, D), or (B, D).

    Of a tuple or list (a U-Net's down block) the first entry is taken. Raises ValueError for anything else.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if hasattr(output, "sample") and not isinstance(output, Tensor):
        output = output.sample
    if isinstance(output, Tensor):
        if output.ndim == 4:
            return output.float().mean((2, 3))
        if output.ndim == 3:
            return output.float().mean(1)
        if output.ndim == 2:
            return output.float()
    what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(f"the tapped layer gives {what}; expected (B, C, H, W), (B, T, D) or (B, D)")


def middle_layers(network: nn.Module) -> list[str]:
    """The network's blocks in the order of the data: of a U-Net down, middle and up, of a transformer all; else empty."""
    stages = _stages(unwrap(network))
    return [] if stages is None else stages[0]


class Tap:
    """A context in which a network is in evaluation mode and each call stops at one layer, or at the last of several.

    On leaving, every module's training flag and the random number generators are as they were found. Raises ValueError
    when a layer does not exist, RuntimeError when a call does not reach it.
    """

    def __init__(self, network: nn.Module, *layers: str) -> None:
        self.network = unwrap(network)
        self.layers = [resolve_layer(self.network, layer) for layer in layers]
        self._outputs: dict[str, Tensor] = {}

    def __enter__(self) -> Tap:
        devices = {p.device for p in self.network.parameters() if p.device.type == "cuda"}
        self._found = ExitStack()
        self._found.enter_context(torch.random.fork_rng(devices=[d.index for d in devices if d.index is not None]))
        self._found.enter_context(evaluating(self.network))
        for layer in dict.fromkeys(self.layers):
            handle = self.network.get_submodule(layer).register_forward_hook(partial(self._reach, layer))
            self._found.callback(handle.remove)
        return self

    def _reach(self, layer: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._outputs[layer] = pool(output)
        if len(self._outputs) == len(set(self.layers)):
            raise _Reached

    def each(self, forward: Callable[[], Any]) -> list[Tensor]:
        """Pooled features (B, D) float32 of every layer during `forward()`, which is left as soon as they are there."""
        self._outputs = {}
        try:
            with torch.no_grad():
                forward()
        except _Reached:
            return [self._outputs[layer] for layer in self.layers]
        finally:
            self._outputs, missing = {}, [layer for layer in self.layers if layer not in self._outputs]
        raise RuntimeError(
            f"the forward pass ended without reaching layer {missing[0]!r} of {type(self.network).__name__}: the denoiser "
            "runs another module, or a compiled copy of this one (tap the network as it was before torch.compile)"
        )

    def __call__(self, forward: Callable[[], Any]) -> Tensor:
        """Pooled features (B, D) float32 of the one layer during `forward()`."""
        return self.each(forward)[0]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._found.close()

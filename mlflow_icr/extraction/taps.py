"""Taps: read one layer's mean-pooled output and leave the forward pass as soon as it is computed."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlflow_icr.extraction.denoisers import evaluating

ALIASES = "encoder, middle (or mid), decoder, mid-1, mid+1, ..., first, last"
# Blocks of diffusers for images and text together, which return (text, image): the image's tokens are read.
JOINT_BLOCKS = {"JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"}


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


class _Stages(NamedTuple):
    """A network's blocks in the order of the data, and the places in it of encoder, middle and decoder."""

    names: list[str]
    encoder: int
    middle: int
    decoder: int

    def place(self, layer: str) -> int | None:
        """The place that an alias means, which may lie outside; None where it is no alias."""
        if layer.startswith(("mid+", "mid-")) and layer[4:].isdigit():
            return self.middle + int(layer[3:])
        aliases = {"mid": self.middle, "middle": self.middle, "encoder": self.encoder, "decoder": self.decoder}
        return (aliases | {"first": 0, "last": len(self.names) - 1}).get(layer)


def _stages(network: nn.Module) -> _Stages | None:
    lists = {name: getattr(network, name, None) for name in ("transformer_blocks", "single_transformer_blocks")}
    blocks = [
        f"{name}.{i}" for name, modules in lists.items() if isinstance(modules, nn.ModuleList) for i in range(len(modules))
    ]
    if blocks:
        middle = len(blocks) // 2  # block 14 of SiT-XL/2's 28, the paper's choice
        return _Stages(blocks, 0, middle, middle)
    down, up = getattr(network, "down_blocks", None), getattr(network, "up_blocks", None)
    if not (isinstance(down, nn.ModuleList) and isinstance(up, nn.ModuleList) and len(down) and len(up)):
        return None
    # Small text-to-image U-Nets go from the last block down straight to the first one up.
    mid = ["mid_block"] if getattr(network, "mid_block", None) is not None else []
    names = [f"down_blocks.{i}" for i in range(len(down))] + mid + [f"up_blocks.{i}" for i in range(len(up))]
    return _Stages(names, len(down) - 1, len(down) - 1 + len(mid), len(down) + len(mid))


def resolve_layer(network: nn.Module, layer: str) -> str:
    """The module path that `layer` means in a network: a path itself, or an alias.

    In a U-Net, `middle` (or `mid`) is the bottleneck, `encoder` the block before it and `decoder` the one after it. In a
    transformer, `encoder` is the first block, and `middle` and `decoder` the middle one. `first` and `last` are the outermost
    blocks, `mid-1`, `mid+1`, ... the neighbours of the middle. Raises ValueError for an unknown name, listing the layers.
    """
    network = unwrap(network)
    paths = [name for name, _ in network.named_modules() if name]
    if layer in paths:
        return layer
    stages = _stages(network)
    if stages is not None:
        place = stages.place(layer)
        if place is not None and 0 <= place < len(stages.names):
            return stages.names[place]
    shown = stages.names if stages is not None else [p for p in paths if p.count(".") <= 1]
    available = (f"aliases {ALIASES} (over " if stages is not None else "module paths (such as ") + ", ".join(shown[:40]) + ")"
    close = difflib.get_close_matches(layer, paths, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"layer is {layer!r}, which {type(network).__name__} does not have{hint}; it has {available}")


def image_stream(module: nn.Module, output: Any) -> Any:
    """The image stream of a joint block's output (text, image); any other output as it is."""
    if type(module).__name__ in JOINT_BLOCKS and isinstance(output, tuple) and len(output) == 2:
        return output[1]
    return output


def pool(output: Any) -> Tensor:
    """Features (B, D) from a layer's output: the mean over space of (B, C, H, W), over tokens of (B, T, D), or (B, D).

    A tuple or list (a U-Net's down block) is pooled by its first entry. Raises ValueError for anything else.
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
    """The network's blocks in the order of the data: a U-Net's down, middle and up, or all of a transformer's; else empty."""
    stages = _stages(unwrap(network))
    return [] if stages is None else stages.names


class Tap:
    """A context in which a network is in evaluation mode and each call stops at one layer, or at the last of several.

    On leaving, every module's training flag and the random number generators are as before. Raises ValueError
    when a layer does not exist, RuntimeError when a call does not reach it.
    """

    def __init__(self, network: nn.Module, *layers: str) -> None:
        self.network = unwrap(network)
        self.layers = [resolve_layer(self.network, layer) for layer in layers]
        self._outputs: dict[str, Tensor] = {}

    def __enter__(self) -> Tap:
        devices = {p.device for p in self.network.parameters() if p.device.type == "cuda"}
        self._stack = ExitStack()
        self._stack.enter_context(torch.random.fork_rng(devices=[d.index for d in devices if d.index is not None]))
        self._stack.enter_context(evaluating(self.network))
        for layer in dict.fromkeys(self.layers):
            handle = self.network.get_submodule(layer).register_forward_hook(partial(self._reach, layer))
            self._stack.callback(handle.remove)
        return self

    def _reach(self, layer: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._outputs[layer] = pool(image_stream(module, output))
        if len(self._outputs) == len(set(self.layers)):
            raise _Reached

    def each(self, forward: Callable[[], Any]) -> list[Tensor]:
        """Pooled features (B, D) float32 of every layer during `forward()`, which ends as soon as they are computed."""
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
        self._stack.close()

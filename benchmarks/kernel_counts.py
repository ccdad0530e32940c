"""Kernels of a training step of `cifar10-4096`, counted by PyTorch's profiler: without dropout, with torch's, with keyed masks.

On CUDA they are the device's own, of the whole step in bf16. Without a device they are those operations of the forward and the
backward pass that compute something, each of which is a kernel on CUDA; a function that inductor compiled counts once.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.presets import side_of
from trainers import dropout
from trainers.config import load_config
from trainers.dropout import key_dropout
from trainers.families import family_of

GOAL = 1800
# Operations that compute nothing: they make tensors, or other views of them.
FREE = frozenset(
    """
    alias as_strided chunk conj contiguous detach empty empty_like empty_strided expand lift_fresh narrow new_empty
    new_empty_strided permute resolve_conj resolve_neg reshape select slice split squeeze t transpose unbind unflatten
    unsqueeze view _reshape_alias _unsafe_view result_type is_nonzero item _local_scalar_dense resize_
    """.split()  # noqa: SIM905 - as a list it would be a column of forty lines
)
COMPILED = ("CompiledFunction", "CompiledFunctionBackward")


def counted(step: Any, device: torch.device) -> int:
    """The kernels of a call."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize()
    events: Any = profiler.events()
    if cuda:
        return sum(event.device_type.name == "CUDA" and "Mem" not in event.name for event in events)
    computing = [
        event for event in events if event.name.startswith("aten::") and not event.cpu_children
        and event.name.removeprefix("aten::").rstrip("_") not in FREE and event.name.removeprefix("aten::") not in FREE
    ]  # fmt: skip
    return len(computing) + sum(event.name in COMPILED for event in events)


def kernels(share: float, masks: str, batch: int, device: torch.device) -> int:
    """The kernels of a step with this share dropped, by masks that are `torch`, `keyed` or `fused`."""
    config = load_config("cifar10-4096", {"dropout": share})
    family = family_of(config)
    network = family.build(3, side_of(config)).to(device)
    if masks != "torch":
        keys = key_dropout(network)
        keys.of_rows = torch.arange(batch, device=device)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    x = torch.randn(batch, 3, side_of(config), side_of(config), device=device)
    level = torch.ones(batch, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = family.loss(family.denoiser(network), x, level, x)
        loss.backward()
        if device.type == "cuda":
            optimizer.step()
            optimizer.zero_grad()

    before = dropout.can_fuse
    dropout.can_fuse = lambda kind: masks == "fused"  # type: ignore[assignment]
    try:
        step()  # compiles
        return counted(step, device)
    finally:
        dropout.can_fuse = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--only", choices=("none", "torch", "keyed", "fused"), help="one of them")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = {
        "none": ("without dropout", 0.0, "torch"),
        "torch": ("torch's dropout", 0.13, "torch"),
        "keyed": ("keyed, operation by operation", 0.13, "keyed"),
        "fused": (f"keyed, compiled (goal: at most {GOAL})", 0.13, "fused"),
    }
    print(f"kernels of a step of cifar10-4096 on {device.type}, a batch of {arguments.batch}")
    for name, (text, share, masks) in cases.items():
        if arguments.only in (None, name):
            print(f"  {text:46} {kernels(share, masks, arguments.batch, device)}", flush=True)


if __name__ == "__main__":
    main()

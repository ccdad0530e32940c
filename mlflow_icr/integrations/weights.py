"""Find the weights to measure: a network in a module, or its average."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mlflow_icr.extraction.taps import unwrap

Where = str | Callable[[Any], Any]  # a dotted path of attributes, or a function, from the module that has it


def find(owner: Any, where: Where, field: str) -> Any:
    """The attribute at a path of an object, or the result of a function of it. Raises ValueError naming the field."""
    if not isinstance(where, str):
        return where(owner)
    try:
        return attrgetter(where)(owner) if where else owner
    except AttributeError:
        children = ", ".join(name for name, _ in owner.named_children()) if isinstance(owner, nn.Module) else ""
        raise ValueError(
            f"{field} is {where!r}, which {type(owner).__name__} does not have; expected a path of attributes"
            + (f", such as one of {children}" if children else "")
        ) from None


def bare(network: Any, field: str) -> nn.Module:
    """A network without wrappers (DistributedDataParallel, torch.compile, AveragedModel). Raises ValueError for no module."""
    while isinstance(network, nn.Module):
        inner = network.module if isinstance(network, AveragedModel) else unwrap(network)
        if inner is network:
            return network
        network = inner
    raise ValueError(f"{field} is a {type(network).__name__}; expected a torch module")


def copy_of(network: nn.Module) -> nn.Module:
    """A network of the same shape on the same device, in evaluation mode; diffusers makes it if possible.

    Accelerate replaces the `forward` of a network that it prepares; a deep copy's would still run the original.
    """
    if hasattr(network, "from_config") and hasattr(network, "config"):
        kind: Any = type(network)
        with torch.random.fork_rng(devices=[]):  # initial weights, which are replaced, are drawn at random on the CPU
            duplicate: nn.Module = kind.from_config(network.config)
        duplicate.load_state_dict(network.state_dict())
        weight = next(network.parameters())
        duplicate = duplicate.to(weight.device)
        if weight.dtype != torch.float32:
            duplicate = duplicate.to(weight.dtype)
    elif "forward" in vars(network):
        raise ValueError(
            f"network is a {type(network).__name__} that Accelerate prepared, which cannot be copied for its average"
        )
    else:
        duplicate = copy.deepcopy(network)
    return duplicate.requires_grad_(False).eval()


def measured_network(network: nn.Module, average: Any) -> tuple[nn.Module, Callable[[], None]]:
    """The network to measure, and a function that updates it: `average` may be None, a module, or diffusers' EMAModel.

    An EMAModel keeps parameters, not a network. They are copied into a second network, and training is not affected.
    Raises ValueError for another kind of average.
    """
    if average is None:
        return network, lambda: None
    if hasattr(average, "copy_to") and hasattr(average, "shadow_params"):
        beside = copy_of(network)
        return beside, lambda: average.copy_to(beside.parameters())
    return bare(average, "ema"), lambda: None

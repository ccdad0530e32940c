"""How a network lies in memory, and what Accelerate has made of it undone: wrappers off, parameters on several ranks whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


def bare(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The network itself, without a wrapper for ranks or a compiled form, whose names would go into checkpoints."""
    return accelerator.unwrap_model(network, keep_torch_compile=False)  # type: ignore[no-any-return]


def use_channels_last(network: nn.Module, accelerator: Accelerator) -> None:
    """On CUDA, lay the weights of convolutions out channels last, as its tensor cores take them; activations follow them.

    Values are the same but for rounding, and checkpoints are as ever. FSDP refuses such parameters, and is spared them. So is
    inductor, whose own such layout is turned off: in torch 2.13 it loses, unsaid, the gradient of what a U-Net scales up.
    """
    if accelerator.state.dynamo_plugin.backend.value == "INDUCTOR":
        import torch._inductor.config as inductor

        inductor.layout_optimization = False
    elif accelerator.device.type == "cuda" and accelerator.distributed_type.value != "FSDP":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def is_sharded(network: nn.Module) -> bool:
    """Whether a rank has only a share of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def gathered(tensor: Tensor) -> Tensor:
    """A tensor entire; one that is shared out is gathered, which all ranks must take part in."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor; of one that is not shared out, itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share_of(share: Tensor, parameter: Tensor) -> DTensor:
    """A rank's share of a tensor that is shared out as a parameter is."""
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        share, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def shared_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """An entire tensor, the same on all ranks, shared out and laid out in memory as a parameter is; all ranks must take part.

    Fused Adam goes through parameters and moments as they lie in memory: where layouts differ it mixes them up, unsaid.
    """
    if not isinstance(parameter, DTensor):
        return torch.empty_like(parameter, requires_grad=False).copy_(tensor)
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def load_whole(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put entire tensors into a network that may be shared out. Raises RuntimeError for names or shapes that do not fit."""
    state = network.state_dict()
    fitting = {
        key: shared_like(value, state[key]) if key in state and value.shape == state[key].shape else value
        for key, value in tensors.items()
    }
    with torch.no_grad():
        network.load_state_dict(fitting)

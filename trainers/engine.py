"""Memory layout of a network, removal of Accelerate's wrappers, and gathering of sharded parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


def bare(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The network without wrappers for ranks or compilation, whose names would go into checkpoints."""
    return accelerator.unwrap_model(network, keep_torch_compile=False)  # type: ignore[no-any-return]


def use_channels_last(network: nn.Module, accelerator: Accelerator) -> None:
    """On CUDA, lay the weights of convolutions out channels last, as its tensor cores take them; activations follow them.

    Values are the same up to rounding, and checkpoints are unchanged. Not used with FSDP, which refuses such parameters, nor
    with inductor, whose own channels-last layout is turned off: in torch 2.13 it silently loses gradients of a U-Net's
    upsampling.
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
    """The unsharded tensor; a sharded one is gathered, and all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor; an unsharded tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share_of(share: Tensor, parameter: Tensor) -> DTensor:
    """A rank's share of a tensor that is sharded like a parameter."""
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        share, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def shared_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor, the same on all ranks, sharded and laid out in memory like a parameter; all ranks must call this.

    Fused Adam reads parameters and moments in memory order; if their layouts differ, it silently mixes them up.
    """
    if not isinstance(parameter, DTensor):
        return torch.empty_like(parameter, requires_grad=False).copy_(tensor)
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def load_whole(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load unsharded tensors into a network that may be sharded. Raises RuntimeError for names or shapes that do not fit."""
    state = network.state_dict()
    fitting = {
        key: shared_like(value, state[key]) if key in state and value.shape == state[key].shape else value
        for key, value in tensors.items()
    }
    with torch.no_grad():
        network.load_state_dict(fitting)

"""A device that says it is MPS, on the CPU: it refuses float64 and tensors of another device, as Apple's does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps", 0)


class MPSTensor(Tensor):
    """A tensor of the CPU, `held`, that says it is on MPS; to C++ it is one of the CPU, for which there are device guards."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> MPSTensor:
        """Raises TypeError for float64, in the device's words."""
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device="cpu", requires_grad=held.requires_grad,
        )  # fmt: skip
        self.held = held
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """MPS."""
        return MPS

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the CPU and say that what comes out is on MPS."""
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on tensors of MPS and numbers, or on those of the CPU alone."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    inside = [t for t in tensors if isinstance(t, MPSTensor)]
    copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if inside and not copies and any(t.ndim for t in tensors if not isinstance(t, MPSTensor)):
        raise RuntimeError(
            f"{func}: Expected all tensors to be on the same device, but found at least two devices, mps:0 and cpu!"
        )
    device = kwargs.get("device")
    to_mps = bool(inside) if device is None else torch.device(device).type == "mps"
    if func is torch.ops.aten.copy_.default:
        to_mps = isinstance(args[0], MPSTensor)
    plain_args, plain = tree_map(lambda x: x.held if isinstance(x, MPSTensor) else x, (args, kwargs))
    if device is not None and to_mps:
        plain["device"] = torch.device("cpu")
    found = func(*plain_args, **plain)
    if func._schema.is_mutable and args and isinstance(args[0], Tensor) and isinstance(found, Tensor):
        return args[0]  # in place
    return tree_map(lambda x: MPSTensor(x) if to_mps and isinstance(x, Tensor) else x, found)


class _Operations(TorchDispatchMode):
    """Every operation, below Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def moved(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`x.to(...)`, of which C++ would see no other device."""
    device, others = x.device, []
    for given in (*args, *(kwargs[key] for key in ("device", "dtype", "other") if kwargs.get(key) is not None)):
        if isinstance(given, Tensor):
            device, others = given.device, [*others, given.dtype]
        elif isinstance(given, torch.dtype):
            others.append(given)
        elif isinstance(given, (torch.device, str)):
            device = torch.device(given)
    held = x.held if isinstance(x, MPSTensor) else x
    for dtype in others:
        held = held.to(dtype)
    return MPSTensor(held) if device.type == "mps" else held


class FakeMPS(TorchFunctionMode):
    """A context in which tensors can be made on MPS and moved there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call from Python."""
        if func is Tensor.to:
            return moved(*args, **(kwargs or {}))
        if func is Tensor.cpu:
            return args[0].held if isinstance(args[0], MPSTensor) else args[0]
        device = (kwargs or {}).get("device")
        if device is not None and torch.device(device).type == "mps":  # made there
            found = func(*args, **kwargs | {"device": "cpu"})
            return found if isinstance(found, MPSTensor) else MPSTensor(found)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self.operations = _Operations()
        self.operations.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.operations.__exit__(*error)


def on_mps(network: nn.Module) -> nn.Module:
    """Move a network's parameters and buffers to the device."""
    for module in network.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = nn.Parameter(MPSTensor(p.detach()), requires_grad=False)
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = MPSTensor(b.float() if b.dtype == torch.float64 else b)
    return network

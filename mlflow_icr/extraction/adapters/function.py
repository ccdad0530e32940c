"""Any function D(x, sigma) as a denoiser, with the network that it runs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class FunctionDenoiser:
    """A function D(x, sigma) as a denoiser; `network` is the module that it runs, or the function itself where it is one.

    x is (B, C, H, W) in [-1, 1] plus noise of standard deviation sigma; the result, of x's shape, is taken as float32. Raises
    ValueError where there is no module to tap.
    """

    def __init__(self, function: Callable[[Tensor, Tensor | float], Tensor], network: nn.Module | None = None) -> None:
        module = function if network is None else network
        if not isinstance(module, nn.Module):
            raise ValueError(f"network is a {type(module).__name__}; expected the torch module that the function runs")
        self._function, self._network = function, module

    @property
    def network(self) -> nn.Module:
        """The network that a call runs."""
        return self._network

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The denoised images, (B, C, H, W) float32."""
        return self._function(x, sigma).float()

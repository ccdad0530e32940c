"""Denoisers: one call D(x, sigma) for the clean image that a network sees in a noisy one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Denoiser(Protocol):
    """Anything with a `network` to tap and a call D(x, sigma) that runs it.

    x is (B, C, H, W) in [-1, 1] plus noise of standard deviation sigma, a float or (B,); the result has x's shape. A denoiser
    of latents also has a method `encode(images)`: x then is `encode(images)` plus noise.
    """

    @property
    def network(self) -> nn.Module:
        """The network that a call runs."""

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The estimate of the clean image in x."""


Call = Callable[[nn.Module, Tensor, Tensor], Any]
"""Runs a network that needs more than x (B, C, H, W) and times (B,), such as a prompt or a class."""

Encode = Callable[[Tensor], Tensor]


def encoder_of(denoiser: Denoiser) -> Encode | None:
    """The denoiser's function from images (B, C, H, W) in [-1, 1] to latents; None for a denoiser of pixels."""
    return getattr(denoiser, "encode", None)


def decoder_of(denoiser: Denoiser) -> Encode | None:
    """The denoiser's function from latents to images; None for a denoiser of pixels."""
    return getattr(denoiser, "decode", None)


def null_class_of(denoiser: Denoiser) -> int | None:
    """The null class of a class-conditional network, which stands for no class; None for a network without classes.

    The null class comes after the others. A transformer whose only class is number 0 needs a label but has no classes.
    """
    label: int | None = getattr(denoiser, "null_class", None)
    return label or None


def device_of(denoiser: Denoiser) -> torch.device:
    """The device of a denoiser's network; the CPU when it has no parameters."""
    return next((p.device for p in denoiser.network.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """A context in which a network is in evaluation mode; afterwards each module has its former training flag."""
    flags = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


class EDMDenoiser:
    """EDM's preconditioning around a network F(x, time), such as diffusers' UNet2DModel.

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise); `sigma_data` is the standard deviation of clean images.
    A class-conditional network has a `null_class`, which stands for no class and is used where no labels are given. `call`
    runs a network with another condition. Raises ValueError for a sigma_data that is not positive.
    Source: Karras et al. 2022, "Elucidating the design space of diffusion-based generative models", table 1.
    """

    def __init__(
        self, network: nn.Module, sigma_data: float = 0.5, *, null_class: int | None = None, call: Call | None = None
    ) -> None:
        if not sigma_data > 0:
            raise ValueError(f"sigma_data is {sigma_data}; expected a positive number")
        self._network, self._call = network, call
        self.sigma_data, self.null_class = sigma_data, null_class

    @property
    def network(self) -> nn.Module:
        """The wrapped network."""
        return self._network

    def __call__(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """The denoised images, (B, C, H, W) float32, for x of that shape, sigma > 0, a float or (B,), and classes (B,)."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(x.shape[0])
        s = sigma.view(-1, 1, 1, 1)
        variance = s.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = s * self.sigma_data / variance.sqrt()
        # UNet2DModel casts a Python float time to long; a tensor keeps c_noise as it is.
        f = run_network(self._network, x / variance.sqrt(), sigma.log() / 4, labels, self.null_class, self._call)
        return c_skip * x + c_out * f


def run_network(
    network: nn.Module,
    x: Tensor,
    time: Tensor,
    labels: Tensor | None = None,
    null_class: int | None = None,
    call: Call | None = None,
) -> Tensor:
    """F(x, time) as a float32 tensor, of a network whose weights may have another type.

    x is (B, C, H, W), time (B,). A network with a null class gets `labels` (B,), or that class for every image. `call` runs a
    network with other conditions.
    """
    weight = next(network.parameters(), x)
    x = x.to(weight.dtype)
    conditions = {}
    if null_class is not None:
        null = torch.full((len(x),), null_class, device=x.device)
        conditions["class_labels"] = null if labels is None else labels.to(x.device)
    output = network(x, time, **conditions) if call is None else call(network, x, time)
    f: Tensor = output.sample if hasattr(output, "sample") else output
    return f.float()


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class SchedulerDenoiser:
    """A network F(x_t, t) trained with a variance-preserving scheduler of diffusers, such as DDPMScheduler or DDIMScheduler.

    Noise sigma on clean images means the scheduler's alpha_bar = 1 / (1 + sigma^2), and x_t = sqrt(alpha_bar) x. With v = sqrt(
    alpha_bar) noise - sqrt(1 - alpha_bar) x_0, the clean image is x - sigma F for `epsilon`, F for `sample`, and alpha_bar x -
    sqrt(1 - alpha_bar) F for `v_prediction`. t is interpolated between timesteps, linearly in log sigma; with `nearest` it is
    rounded, for networks that look timesteps up in a table. Noise beyond the scheduler's range gets its first or last timestep.
    If a network also predicts a variance, the second half of its channels is ignored. The `null_class` of a class-conditional
    network is used where no labels are given; `call` runs a network with another condition. Raises ValueError for a scheduler
    without alphas_cumprod or with another prediction type.
    Source: Ho et al. 2020, equation 4; Salimans & Ho 2022, appendix D (v).
    """

    def __init__(
        self,
        network: nn.Module,
        scheduler: Any,
        *,
        nearest: bool = False,
        null_class: int | None = None,
        call: Call | None = None,
    ) -> None:
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if not isinstance(alphas, Tensor):
            raise ValueError(
                f"scheduler is a {type(scheduler).__name__}, without alphas_cumprod; expected DDPMScheduler or one of its kind"
            )
        self.prediction_type = str(scheduler.config.prediction_type)
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {self.prediction_type!r}; expected one of {', '.join(PREDICTION_TYPES)}")
        self._network, self._call = network, call
        self.nearest, self.null_class = nearest, null_class
        alphas = alphas.detach().double().cpu()
        # A rescaled schedule ends in pure noise, alpha_bar = 0, whose sigma has no logarithm to interpolate in.
        alphas = alphas[alphas > 0]
        self.log_sigmas = ((1 - alphas) / alphas).log() / 2  # (T,), increasing

    @property
    def network(self) -> nn.Module:
        """The wrapped network."""
        return self._network

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timesteps (B,) of noise levels (B,): float32, or int64 with `nearest`."""
        # MPS has no float64, which separates neighbouring timesteps of long schedules best.
        kind = torch.float32 if sigma.device.type == "mps" else torch.float64
        log_sigmas = self.log_sigmas.to(kind).to(sigma.device)
        wanted = sigma.to(kind).log().clamp(log_sigmas[0], log_sigmas[-1])
        right = torch.searchsorted(log_sigmas, wanted).clamp(1, len(log_sigmas) - 1)
        left = right - 1
        t = left + (wanted - log_sigmas[left]) / (log_sigmas[right] - log_sigmas[left])
        return t.round().long() if self.nearest else t.float()

    def predict(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """F(x_t, t): the network's prediction at x_t (B, C, H, W) and timesteps (B,), in the scheduler's prediction type."""
        return run_network(self._network, x, t, labels, self.null_class, self._call)[:, : x.shape[1]]

    def __call__(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """The denoised images, (B, C, H, W) float32, for x of that shape, sigma > 0, a float or (B,), and classes (B,)."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(x.shape[0])
        s = sigma.view(-1, 1, 1, 1)
        alpha = 1 / (1 + s.square())
        f = self.predict(alpha.sqrt() * x, self.timestep(sigma), labels)
        if self.prediction_type == "epsilon":
            return x - s * f
        if self.prediction_type == "sample":
            return f
        return alpha * x - s * alpha.sqrt() * f  # sqrt(1 - alpha_bar) = sigma sqrt(alpha_bar)

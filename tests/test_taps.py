"""Taps and denoisers on diffusers' networks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from mlflow_icr import EDMDenoiser, heun_sample
from mlflow_icr.extraction.samplers import karras_sigmas
from mlflow_icr.extraction.taps import Tap, pool, resolve_layer, unwrap


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=4, sample_size=8, patch_size=2,
        num_embeds_ada_norm=3, norm_num_groups=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "path"),
    [
        ("decoder", "up_blocks.0"),
        ("mid", "mid_block"),
        ("mid+1", "up_blocks.0"),
        ("mid+2", "up_blocks.1"),
        ("mid-1", "down_blocks.1"),
        ("mid-2", "down_blocks.0"),
        ("up_blocks.1.resnets.0", "up_blocks.1.resnets.0"),
    ],
)
def test_early_exit_gives_what_the_whole_forward_gives(small_unet: nn.Module, x: torch.Tensor, layer: str, path: str) -> None:
    denoiser = EDMDenoiser(small_unet)
    assert resolve_layer(small_unet, layer) == path
    seen = []

    def look(module: nn.Module, inputs: object, output: object) -> None:
        output = output[0] if isinstance(output, tuple) else output
        seen.append(output.mean((2, 3)))

    handle = small_unet.get_submodule(path).register_forward_hook(look)
    with torch.no_grad():
        small_unet.eval()
        denoiser(x, 0.3)
    handle.remove()
    with Tap(small_unet, layer) as tap:
        assert torch.equal(tap(lambda: denoiser(x, 0.3)), seen[0])


def test_layers_after_the_tap_do_not_run(small_unet: nn.Module, x: torch.Tensor) -> None:
    ran = []
    handle = small_unet.conv_out.register_forward_hook(lambda *_: ran.append(1))
    with Tap(small_unet, "decoder") as tap:
        tap(lambda: EDMDenoiser(small_unet)(x, 0.3))
    handle.remove()
    assert ran == []


def test_transformer_tokens_are_pooled(transformer: nn.Module, x: torch.Tensor) -> None:
    assert resolve_layer(transformer, "decoder") == resolve_layer(transformer, "mid") == "transformer_blocks.2"
    assert resolve_layer(transformer, "mid-1") == "transformer_blocks.1"
    with Tap(transformer, "mid") as tap:
        features = tap(lambda: transformer(x, torch.zeros(5), class_labels=torch.zeros(5, dtype=torch.long)))
    assert features.shape == (5, 16)


def test_mode_generators_and_hooks_are_left_as_found(small_unet: nn.Module, x: torch.Tensor) -> None:
    small_unet.train()
    small_unet.mid_block.eval()  # a frozen part of a training network
    flags = [m.training for m in small_unet.modules()]
    hooks = sum(len(m._forward_hooks) for m in small_unet.modules())
    state = torch.get_rng_state()

    class Noisy(EDMDenoiser):
        def __call__(self, x: torch.Tensor, sigma: object) -> torch.Tensor:
            torch.rand(3)
            assert not small_unet.training
            return super().__call__(x, sigma)

    with Tap(small_unet, "mid") as tap:
        tap(lambda: Noisy(small_unet)(x, 0.3))
    with pytest.raises(ZeroDivisionError), Tap(small_unet, "mid") as tap:
        tap(lambda: 1 / 0)
    assert [m.training for m in small_unet.modules()] == flags
    assert sum(len(m._forward_hooks) for m in small_unet.modules()) == hooks
    assert torch.equal(torch.get_rng_state(), state)
    small_unet.eval()


def test_a_wrong_name_lists_the_layers(small_unet: nn.Module, transformer: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=r"'up_block.0', which UNet2DModel does not have; did you mean .*up_blocks.0.*mid_block"
    ):
        resolve_layer(small_unet, "up_block.0")
    with pytest.raises(ValueError, match=r"down_blocks\.0, down_blocks\.1, mid_block, up_blocks\.0, up_blocks\.1"):
        resolve_layer(small_unet, "mid+9")
    with pytest.raises(ValueError, match=r"transformer_blocks.0, .*transformer_blocks.3"):
        resolve_layer(transformer, "nonsense")
    with pytest.raises(ValueError, match="module paths"):
        resolve_layer(nn.Sequential(nn.Linear(2, 2)), "mid")


def test_a_layer_that_is_not_reached_is_an_error(small_unet: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="without reaching layer 'mid_block'"), Tap(small_unet, "mid") as tap:
        tap(lambda: x + 1)


def test_compiled_networks_are_tapped_underneath(small_unet: nn.Module) -> None:
    compiled = torch.compile(small_unet, backend="eager")
    assert unwrap(compiled) is small_unet
    assert resolve_layer(compiled, "mid") == "mid_block"


def test_pooling() -> None:
    x = torch.arange(24.0).view(1, 2, 3, 4)
    assert torch.equal(pool(x), x.mean((2, 3)))
    assert torch.equal(pool((x, None)), x.mean((2, 3)))
    assert torch.equal(pool(x[0]), x[0].mean(1))
    assert torch.equal(pool(x[0, 0].bfloat16()), x[0, 0])
    for bad in (x[0, 0, 0], None, (), x[None]):
        with pytest.raises(ValueError, match="the tapped layer gives"):
            pool(bad)


def test_edm_preconditioning_is_the_papers(x: torch.Tensor) -> None:
    """D = c_skip x + c_out F(c_in x, ln(sigma)/4), with F an affine map that shows its inputs."""

    class F(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return 3 * x + t.view(-1, 1, 1, 1)

    sigma, sd = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0]), 0.5
    s = sigma.view(-1, 1, 1, 1).double()
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / (s**2 + sd**2).sqrt()
    expected = c_skip * x + c_out * (3 * x / (s**2 + sd**2).sqrt() + s.log() / 4)
    torch.testing.assert_close(EDMDenoiser(F(), sd)(x, sigma).double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="sigma_data is 0"):
        EDMDenoiser(F(), 0)


def test_noise_levels_are_karras() -> None:
    sigmas = karras_sigmas(18, 0.002, 80, 7)
    assert (sigmas[0], sigmas[-2], sigmas[-1]) == (pytest.approx(80), pytest.approx(0.002), 0)
    assert sigmas == sorted(sigmas, reverse=True)
    seventh = [s ** (1 / 7) for s in sigmas[:-1]]
    assert [a - b for a, b in pairwise(seventh)] == pytest.approx([(80 ** (1 / 7) - 0.002 ** (1 / 7)) / 17] * 17)
    for steps, low, high in ((1, 0.1, 1), (9, 0, 1), (9, 2, 1)):
        with pytest.raises(ValueError, match="expected"):
            karras_sigmas(steps, low, high, 7)


def test_heun_sampling_of_a_gaussian_is_exact_to_second_order() -> None:
    """For data N(mean, s^2) the ideal denoiser is known, and so is where the flow ends: mean + s z, up to sigma_max."""
    mean, std = 0.3, 0.4

    class Ideal:
        network = nn.Identity()

        def __call__(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
            return mean + std**2 / (std**2 + sigma**2) * (x - mean)

    z = torch.randn(2000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    exact = mean + (80 * z - mean) * std / (std**2 + 80**2) ** 0.5
    errors = [float((heun_sample(Ideal(), z, num_steps=steps) - exact).abs().max()) for steps in (64, 128, 256)]
    assert errors[2] < 1e-3  # of samples that are spread over +-1.5
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3  # halving the steps of a second-order method quarters the error

"""Keyed dropout: coins that are fair and independent, the same however a batch is divided."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from trainers.config import load_config
from trainers.dropout import KeyedDropout, fused, key_dropout
from trainers.families import family_of

SHAPE = (96, 16, 12, 12)


def layers(p: float, count: int = 2) -> list[KeyedDropout]:
    network = nn.Sequential(*(nn.Dropout(p) for _ in range(count)))
    keys = key_dropout(network)
    keys.of_rows = torch.from_numpy(np.random.default_rng(5).integers(2**63, size=SHAPE[0]))
    return [layer for layer in network if isinstance(layer, KeyedDropout)]


@pytest.mark.parametrize("p", [0.1, 0.13, 0.5, 0.9])
def test_masks_are_independent_coins(p: float) -> None:
    """No test of some forty is as unlikely as one in a thousand; the keys are fixed, so that it passes always or never."""
    first, second = (layer.kept(torch.empty(SHAPE)) for layer in layers(p))
    assert stats.binomtest(int(first.sum()), first.numel(), 1 - p).pvalue > 1e-3
    # Each row and each place by itself, too: a chi-square each, whose p-values are uniform.
    for dimension in (0, 1):
        counts = first.flatten(1).sum(1 - dimension).numpy()
        of = first.numel() // len(counts)
        statistic = ((counts - of * (1 - p)) ** 2 / (of * p * (1 - p))).sum()
        assert 1e-3 < stats.chi2.cdf(statistic, len(counts)) < 1 - 1e-3
    beside = {
        "layers": (first, second),
        "images": (first[:-1], first[1:]),
        "channels": (first[:, :-1], first[:, 1:]),
        "rows": (first[..., :-1, :], first[..., 1:, :]),
        "columns": (first[..., :-1], first[..., 1:]),
        "a place further in the next image": (first[:-1, ..., :-1], first[1:, ..., 1:]),
        "a place further in the next layer": (first[..., :-1], second[..., 1:]),
    }
    for name, (one, other) in beside.items():
        table = [[int((one & other).sum()), int((one & ~other).sum())], [int((~one & other).sum()), int((~one & ~other).sum())]]
        assert stats.chi2_contingency(table, correction=False).pvalue > 1e-3, name
    # No two images agree more than chance has the closest pair of them agree.
    found = np.corrcoef(first.flatten(1).double().numpy())
    bound = stats.norm.isf(1e-3 / len(found) ** 2) / first[0].numel() ** 0.5
    assert np.abs(found - np.eye(len(found))).max() < bound


def test_keys_that_differ_in_one_bit_have_nothing_in_common() -> None:
    (layer,) = layers(0.5, 1)
    key = 0x0123456789ABCDEF
    layer.keys.of_rows = torch.tensor([key, *(key ^ (1 << bit) for bit in range(63))])
    kept = layer.kept(torch.empty(64, 4096)).double().numpy()
    found = np.corrcoef(kept)
    assert (
        np.abs(found - np.eye(64)).max() < 5.5 / 64
    )  # deviations of 4096 tosses; in 2016 pairs by chance once in 13 000 times


@pytest.mark.parametrize("shape", [SHAPE, (96, 50, 24)])
def test_a_row_has_its_mask_wherever_it_is(shape: tuple[int, ...]) -> None:
    (layer,) = layers(0.2, 1)
    x, keys = torch.randn(shape), layer.keys.of_rows
    assert keys is not None
    whole = layer(x)
    assert not torch.equal(whole[0] == 0, whole[1] == 0)
    places = torch.randperm(len(x))
    for rows in (slice(0, 32), slice(32, 96), places):
        layer.keys.of_rows = keys[rows]
        assert torch.equal(layer(x[rows]), whole[rows])
    layer.keys.of_rows = keys
    if x.dim() == 4:
        last = layer(x.to(memory_format=torch.channels_last))
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(last, whole)
    assert torch.equal(layer(x.bfloat16()) == 0, whole == 0)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_what_stays_is_scaled_and_so_is_its_gradient() -> None:
    (layer,) = layers(0.2, 1)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    kept = layer.kept(x)
    out = layer(x)
    torch.testing.assert_close(out, x * kept / 0.8)
    out.sum().backward()
    torch.testing.assert_close(x.grad, kept.double() / 0.8)
    layer.eval()
    assert layer(x) is x


@pytest.mark.parametrize("preset", ["digits", "fashion-mnist-flow"])
def test_a_network_is_the_same_but_for_its_dropout(preset: str) -> None:
    """In evaluation it is diffusers' own; in training each of its dropout layers has a mask of its own."""
    config = load_config(preset, {"dropout": 0.25})
    network = family_of(config, None).build(1, 8).eval()
    of_torch = [module for module in network.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    assert of_torch
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 4.0])
    named = {} if preset == "digits" else {"class_labels": torch.zeros(2, dtype=torch.long)}
    before, names = network(x, time, **named).sample, list(network.state_dict())
    keys = key_dropout(network)
    keyed = [module for module in network.modules() if isinstance(module, KeyedDropout)]
    assert len(keyed) == len(of_torch)
    assert sorted(module.layer for module in keyed) == list(range(len(keyed)))
    assert not [module for module in network.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    assert torch.equal(network(x, time, **named).sample, before)
    assert list(network.state_dict()) == names
    network.train()
    keys.of_rows = torch.tensor([1, 2])
    both = network(x, time, **named).sample
    assert preset != "digits" or not torch.equal(both, before)  # a flow's blocks begin as identity
    keys.of_rows = torch.tensor([2])
    torch.testing.assert_close(network(x[1:], time[1:], **{k: v[1:] for k, v in named.items()}).sample, both[1:])


@pytest.mark.slow  # a C++ compiler's time
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_it_is_one_kernel_each_way_whatever_the_shape_with_the_same_masks() -> None:
    """On the CPU, where a kernel is a C++ loop; on CUDA it is the same graph, in Triton."""
    from torch._inductor import metrics

    (layer,) = layers(0.2, 1)
    torch._dynamo.reset()
    metrics.reset()
    for shape in ((6, 8, 4, 4), (6, 16, 2, 2)):
        layer.keys.of_rows = torch.arange(6) * 0x123456789ABC
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).to(memory_format=layout).requires_grad_()
            expected, found = layer(x), fused(0.2)(x, *layer.keys.words(0))
            assert torch.equal(found, expected)
            assert found.is_contiguous(memory_format=layout)
            (gradient,) = torch.autograd.grad(found.sum(), x)
            assert torch.equal(gradient, (expected != 0) / torch.tensor(0.8))
    assert metrics.generated_kernel_count <= 2 * 2  # forward and backward, for each layout
    torch._dynamo.reset()

"""Faults of the core that were mended, each as it was found."""

from __future__ import annotations

import copy
import resource

import numpy as np
import pytest
import torch
from torch import nn

from mlflow_icr import EDMDenoiser, GenerationMonitor, ICRMonitor, Protocol, ViewMoments, icr, icr_interval
from mlflow_icr.extraction import views
from mlflow_icr.extraction.views import as_unit_interval, make_views
from mlflow_icr.generation import Neighbours, Reference, fld, generalization, k_nearest
from mlflow_icr.monitoring import neighbours
from mlflow_icr.monitoring.errors import ErrorReader
from mlflow_icr.monitoring.judgement import judge
from mlflow_icr.monitoring.section import growth_across
from mlflow_icr.representation import moments as moments_module
from tests.features import covariance, gaussian_features


def test_growth_goes_on_after_resuming_with_shrinkage(small_unet: nn.Module, digits: torch.Tensor) -> None:
    protocol = Protocol(num_images=16, num_views=2, shrinkage="ledoit-wolf")
    monitor = ICRMonitor(EDMDenoiser(small_unet), digits, protocol)
    first = monitor.measure(1).values["repr/fisher_residual_growth"]
    again = ICRMonitor(EDMDenoiser(small_unet), digits, protocol)
    again.load_state_dict(monitor.state_dict())
    assert again.measure(2).values["repr/fisher_residual_growth"] == pytest.approx(first, rel=1e-9)


def test_a_channel_that_fires_in_one_image_has_no_interval(rng: np.random.Generator) -> None:
    h = gaussian_features(rng, 60, 4, covariance(rng, 6), covariance(rng, 6))
    assert icr_interval(torch.from_numpy(h)).low < icr(torch.from_numpy(h)).icr
    h[:, :, 3] = 0.5
    h[17, :, 3] = rng.standard_normal(4)
    with pytest.raises(ValueError, match="Sigma_xi is singular without image 17"):
        icr_interval(torch.from_numpy(h))


def test_images_that_all_have_copies_have_no_far_bias(digits: torch.Tensor) -> None:
    protocol = Protocol(num_images=8, num_views=2)
    for images in (digits[:1].expand(8, -1, -1, -1).clone(), torch.cat([digits[:4], digits[:4]])):
        found = ErrorReader(images, protocol, 64)
        assert found.far_bias is None
        assert found.chosen == "near"


def test_growth_of_two_samples_of_one_distribution_is_one(rng: np.random.Generator) -> None:
    sigma_s, sigma_xi = covariance(rng, 8), covariance(rng, 8)
    whole, halves = [], []
    for _ in range(200):  # nu / D is 4
        a, b = (torch.from_numpy(gaussian_features(rng, 17, 3, sigma_s, sigma_xi)) for _ in range(2))
        whole.append(icr(a).fisher_residual_growth(icr(b)))
        parts = [torch.stack([icr(x[i::2]).sigma_residual for i in (0, 1)]) for x in (a, b)]
        halves.append(np.log(growth_across(*parts)))
    assert np.mean(whole) == pytest.approx(1, abs=4 * np.std(whole) / 200**0.5)
    assert np.mean(halves) == pytest.approx(0, abs=4 * np.std(halves) / 200**0.5)
    assert growth_across(parts[0], parts[0]) == pytest.approx(1)
    assert growth_across(parts[0], 3 * parts[0]) == pytest.approx(3)


def test_moments_are_made_in_parts(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    h = torch.from_numpy(gaussian_features(rng, 30, 3, covariance(rng, 5), covariance(rng, 5), mean=100.0)).float()
    whole = ViewMoments(3, 5).update(h).spectrum()
    monkeypatch.setattr(moments_module, "CHUNK", 60)  # 4 images at a time
    parts = ViewMoments(3, 5).update(h).spectrum()
    np.testing.assert_allclose(parts.sigma_residual, whole.sigma_residual, rtol=1e-9)
    np.testing.assert_allclose(parts.sigma_invariant, whole.sigma_invariant, rtol=1e-7, atol=1e-9)


def test_a_monitor_of_a_million_images_copies_none(digits: torch.Tensor, small_unet: nn.Module) -> None:
    million = torch.zeros(1, 1, 64, 64, dtype=torch.uint8).expand(1_000_000, 1, 64, 64)  # one image in memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monitor = ICRMonitor(EDMDenoiser(small_unet), million)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    assert monitor.protocol.num_images == 1024
    with pytest.raises(ValueError, match="range from"):
        ICRMonitor(EDMDenoiser(small_unet), digits.float())


def test_the_digest_knows_strengths_type_and_condition(
    small_unet: nn.Module, digits: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ICRMonitor(EDMDenoiser(small_unet), digits).protocol
    half = ICRMonitor(EDMDenoiser(copy.deepcopy(small_unet).bfloat16()), digits).protocol
    classes = ICRMonitor(EDMDenoiser(small_unet, null_class=3, call=lambda network, x, t: network(x, t)), digits).protocol
    digests = {plain.digest, half.digest, classes.digest}
    monkeypatch.setitem(views.AUGMENTATION_CONSTANTS, "rotation_degrees", 20.0)
    assert len(digests | {plain.digest}) == 4


def test_pictures_of_neighbours_make_only_the_views_they_show(digits: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(images: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        made.append(len(images))
        return make_views(images, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(neighbours, "make_views", counted)
    features = torch.randn(64, 2, 8, generator=torch.Generator().manual_seed(0))
    neighbours.neighbour_pictures(features, digits, Protocol())
    assert made == [60]


def test_every_search_of_a_judgement_is_the_given_one(small_unet: nn.Module, digits: torch.Tensor) -> None:
    calls = []

    def search(x: torch.Tensor, y: torch.Tensor, k: int, **options: object) -> Neighbours:
        calls.append(len(y))
        return k_nearest(x, y, k, **options)  # type: ignore[arg-type]

    pixels = as_unit_interval(digits).flatten(1)
    judge(pixels[:10] + 0.01, Reference(pixels, search), None, "pixels", search=search)
    assert len(calls) == 4  # copies, own distances, authenticity, Carlini's
    calls.clear()
    GenerationMonitor(EDMDenoiser(small_unet), digits, num_samples=4, num_steps=2, search=search).measure(1)
    assert len(calls) == 5


def test_fld_of_many_is_that_of_a_part(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test, fake = (torch.from_numpy(rng.standard_normal((n, 4))) for n in (400, 300, 50))
    whole = fld(train, test, fake)
    monkeypatch.setattr(generalization, "PAIRS", 50 * 150)  # fits to 150 rows, likelihoods of 150 at a time
    assert fld(train, test, fake) == pytest.approx(whole, abs=3)


class Classes(nn.Module):
    """A network of two classes, whose answer is the class's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, time: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.layer(x) + class_labels.view(-1, 1, 1, 1)))


def test_a_network_of_classes_is_read_as_of_each_images_own(digits: torch.Tensor) -> None:
    torch.manual_seed(0)
    denoiser, labels = EDMDenoiser(Classes(), null_class=2), torch.arange(64) % 2
    protocol = Protocol(layer="layer", num_images=48, num_views=4)
    values = ICRMonitor(denoiser, digits, protocol, labels=labels).measure(1).values
    assert {"repr/icr", "repr_class/icr", "repr_class/view_error_ratio"} <= values.keys()
    assert values["repr_class/image_error"] != values["repr/image_error"]
    assert "repr_class/icr" not in ICRMonitor(denoiser, digits, protocol).measure(1).values
    parts = ICRMonitor(denoiser, digits, protocol, labels=labels, batch_size=7).measure(1).values
    assert parts["repr_class/image_error"] == pytest.approx(values["repr_class/image_error"], rel=1e-5)
    assert parts["repr_class/icr"] == pytest.approx(values["repr_class/icr"], rel=1e-3)

"""Companions against their definitions written again in numpy, scikit-learn, and cases with a known answer."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from sklearn.covariance import OAS, LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from mlflow_icr import (
    EDMDenoiser,
    ICRMonitor,
    Protocol,
    ViewMoments,
    alignment,
    class_separation,
    effective_rank,
    feature_deviation,
    heldout_error_ratio,
    icr,
    knn_accuracy,
    lidar,
    linear_probe_accuracy,
    rankme,
    silhouette,
    stable_rank,
    uniformity,
    variability_ratio,
    view_auc,
    view_error_ratio,
    view_excess,
)
from mlflow_icr.monitoring.companions import NAMES
from mlflow_icr.monitoring.shrinkage import shrunk
from mlflow_icr.representation import principal_directions
from tests.features import covariance, gaussian_features, two_way


@pytest.fixture
def h(rng: np.random.Generator) -> np.ndarray:
    return gaussian_features(rng, 40, 3, covariance(rng, 8), covariance(rng, 8), mean=1.5)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def entropy_rank(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def test_alignment_and_uniformity_are_means_over_pairs(h: np.ndarray) -> None:
    z, x = unit(h), torch.from_numpy(h)
    pairs = [((z[:, a] - z[:, b]) ** 2).sum(-1).mean() for a, b in itertools.combinations(range(3), 2)]
    assert alignment(x) == pytest.approx(np.mean(pairs), rel=1e-12)
    spread = np.log(np.mean([np.exp(-2 * pdist(z[:, k], "sqeuclidean")).mean() for k in range(3)]))
    assert uniformity(x) == pytest.approx(spread, rel=1e-10)
    assert alignment(x[:, :1].expand(-1, 2, -1)) == pytest.approx(0, abs=1e-15)


def test_ranks_are_entropies_of_spectra(h: np.ndarray) -> None:
    x, rows = torch.from_numpy(h), h.reshape(-1, 8)
    s = np.linalg.svd(rows, compute_uv=False)
    assert rankme(x) == pytest.approx(entropy_rank(s / s.sum() + 1e-7), rel=1e-9)
    values = np.linalg.eigvalsh(np.cov(rows, rowvar=False))
    assert effective_rank(x) == pytest.approx(entropy_rank(values / values.sum()), rel=1e-9)
    isotropic = torch.from_numpy(np.random.default_rng(0).standard_normal((4000, 2, 6)))
    for measure in (rankme, effective_rank, lidar):
        assert measure(isotropic) == pytest.approx(6, rel=0.01)
        flat = isotropic * torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64)
        assert measure(flat) == pytest.approx(3, rel=0.01)


def test_lidar_is_the_rank_of_the_discriminant(h: np.ndarray) -> None:
    n, k, d = h.shape
    means = h.mean(1)
    w = (h - means[:, None]).reshape(-1, d)
    sigma_w = w.T @ w / (n * k) + 1e-4 * np.eye(d)
    b = means - means.mean(0)
    values, vectors = np.linalg.eigh(sigma_w)
    root = vectors / np.sqrt(values) @ vectors.T
    lam = np.linalg.eigvalsh(root @ (b.T @ b / n) @ root)
    assert lidar(torch.from_numpy(h)) == pytest.approx(entropy_rank(lam / lam.sum() + 1e-7), rel=1e-9)


def test_variability_collapse(h: np.ndarray, rng: np.random.Generator) -> None:
    n, k, d = h.shape
    labels = rng.integers(0, 3, n)

    def by_definition(groups: np.ndarray) -> float:
        """Papyan et al. 2020, with scatter matrices as loops over samples."""
        flat, y = h.reshape(-1, d), np.repeat(groups, k)
        centre, names = flat.mean(0), np.unique(y)
        sigma_w = sum(np.outer(r - flat[y == c].mean(0), r - flat[y == c].mean(0)) for c in names for r in flat[y == c]) / (
            n * k
        )
        sigma_b = sum(np.outer(flat[y == c].mean(0) - centre, flat[y == c].mean(0) - centre) for c in names) / len(names)
        return float(np.trace(sigma_w @ np.linalg.pinv(sigma_b, hermitian=True)) / len(names))

    x = torch.from_numpy(h)
    assert variability_ratio(x) == pytest.approx(by_definition(np.arange(n)), rel=1e-8)
    assert variability_ratio(x, torch.from_numpy(labels)) == pytest.approx(by_definition(labels), rel=1e-6)
    with pytest.raises(ValueError, match="labels name 1 class"):
        variability_ratio(x, torch.zeros(n, dtype=torch.long))


def test_class_separation_is_a_ratio_of_mean_cosine_distances(h: np.ndarray, rng: np.random.Generator) -> None:
    labels = rng.integers(0, 4, len(h))
    z, y = h.reshape(-1, 8), np.repeat(labels, 3)
    blocks = np.array([[cdist(z[y == a], z[y == b], "cosine").mean() for b in range(4)] for a in range(4)])
    expected = 1 - np.diag(blocks).mean() / blocks.mean()
    assert class_separation(torch.from_numpy(h), torch.from_numpy(labels)) == pytest.approx(expected, rel=1e-9)


def test_labelled_probes_find_classes_that_are_there(rng: np.random.Generator) -> None:
    centres = rng.standard_normal((3, 5)) * 9
    y = rng.integers(0, 3, 300)
    x = torch.from_numpy(centres[y] + rng.standard_normal((300, 5)))
    labels = torch.from_numpy(y)
    noise = torch.from_numpy(rng.integers(0, 3, 300))
    for score in (linear_probe_accuracy, knn_accuracy):
        assert score(x[:200], labels[:200], x[200:], labels[200:]) > 0.93
        assert score(x[:200], noise[:200], x[200:], noise[200:]) < 0.5
    # Another classifier of the same Gaussian classes agrees.
    lda = LinearDiscriminantAnalysis().fit(x[:200].numpy(), y[:200]).score(x[200:].numpy(), y[200:])
    assert linear_probe_accuracy(x[:200], labels[:200], x[200:], labels[200:]) == pytest.approx(lda, abs=0.03)
    distances = cdist(x.numpy(), x.numpy())
    widths = []
    for i in range(300):
        means = [distances[i][(y == c) & (np.arange(300) != i)].mean() for c in range(3)]
        own, other = means[y[i]], min(m for c, m in enumerate(means) if c != y[i])
        widths.append((other - own) / max(own, other))
    assert silhouette(x, labels) == pytest.approx(np.mean(widths), rel=1e-9)
    with pytest.raises(ValueError, match=r"expected \(300,\) integers"):
        silhouette(x, labels.double())
    with pytest.raises(ValueError, match=r"expected \(N, D\)"):
        silhouette(x[None], labels)


@pytest.mark.parametrize("measure", [alignment, uniformity, rankme, effective_rank, lidar, variability_ratio])
def test_rotations_change_nothing_and_bad_features_are_refused(
    h: np.ndarray, rng: np.random.Generator, measure: object
) -> None:
    q = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    assert measure(torch.from_numpy(h @ q)) == pytest.approx(measure(torch.from_numpy(h)), rel=1e-7)  # type: ignore[operator]
    for bad, message in ((h[0], "expected (N, K, D)"), (h[:, :1], "K >= 2"), (h * np.nan, "NaN or Inf")):
        with pytest.raises(ValueError, match=re.escape(message)):
            measure(torch.from_numpy(bad))  # type: ignore[operator]


def test_view_errors_in_closed_form_and_simulation(rng: np.random.Generator) -> None:
    a = torch.tensor([1.0, 2.0, 3.0])
    equal = view_error_ratio(a, 4 * a)
    assert (equal.value, equal.low, equal.high) == pytest.approx((4, 4, 4))  # the same factor for all: no doubt
    inside = 0
    for _ in range(400):
        own = rng.gamma(3, 1 / 3, 80)
        views = 2.5 * (0.5 * own + 0.5 * rng.gamma(3, 1 / 3, 80))  # correlated, ratio of expectations 2.5
        found = view_error_ratio(torch.from_numpy(own), torch.from_numpy(views))
        inside += found.low <= 2.5 <= found.high
    assert 0.92 <= inside / 400 <= 0.98
    for bad in (torch.ones(3), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"expected \(N,\) twice"):
            view_error_ratio(bad, torch.ones(4))
    with pytest.raises(ValueError, match="all 0"):
        view_error_ratio(torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="not finite"):
        view_error_ratio(torch.full((4,), float("nan")), torch.ones(4))


def test_aucs_excesses_and_heldout_ratios(rng: np.random.Generator) -> None:
    none_of_128 = view_auc(torch.ones(128), torch.full((128,), 0.5))
    assert (none_of_128.value, none_of_128.low) == (0, 0)
    assert none_of_128.high == pytest.approx(1 - 0.025 ** (1 / 128))  # the closed form of Clopper and Pearson at 0
    ties = view_auc(torch.ones(10), torch.ones(10))
    assert (ties.value, ties.low, ties.high) == (0.5, 0, 1)
    # A network that gives the image, whichever of the two it sees, errs by the whole way more.
    image, way = torch.from_numpy(rng.gamma(3, 1, 50)), torch.from_numpy(rng.gamma(3, 1, 50))
    known = view_excess(image, image + way, way)
    assert (known.value, known.low, known.high) == pytest.approx((1, 1, 1))
    inside = 0
    for _ in range(300):
        train, heldout = rng.gamma(3, 1, 80), 1.7 * rng.gamma(3, 1, 120)
        found = heldout_error_ratio(torch.from_numpy(train), torch.from_numpy(heldout))
        inside += found.low <= 1.7 <= found.high
    assert 0.91 <= inside / 300 <= 0.99


def test_rank_of_weights_and_deviation_of_features() -> None:
    assert stable_rank([torch.eye(5), torch.ones(4, 2, 3)]) == pytest.approx((5 + 1) / 2)
    spiky = torch.zeros(4, 2, 16)
    spiky[:, :, 3] = 7
    assert feature_deviation(spiky) == pytest.approx((1 / 16 * (1 - 1 / 16)) ** 0.5)
    assert feature_deviation(torch.ones(4, 2, 16)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="weights are 0"):
        stable_rank([torch.zeros(3, 3)])


def test_shrinkage_is_scikit_learns(rng: np.random.Generator) -> None:
    """With K = 2 the residuals are half the differences of the views: a plain sample that scikit-learn can take."""
    h = gaussian_features(rng, 30, 2, covariance(rng, 40), covariance(rng, 40))
    d = (h[:, 0] - h[:, 1]) / 2**0.5
    d = (d - d.mean(0)) * (30 / 29) ** 0.5
    moments = ViewMoments(2, 40).update(torch.from_numpy(h))
    with pytest.raises(ValueError, match="29 degrees of freedom for D = 40"):
        moments.spectrum()
    residuals = moments.centred(torch.from_numpy(h))[1]
    for method, reference in (("ledoit-wolf", LedoitWolf), ("oas", OAS)):
        fitted = reference(assume_centered=True).fit(d)
        found = shrunk(moments, residuals, method)
        assert found.shrinkage == pytest.approx(fitted.shrinkage_, rel=1e-9)
        np.testing.assert_allclose(found.sigma_residual, fitted.covariance_, atol=1e-12)
        np.testing.assert_allclose(found.sigma_invariant, two_way(h)[0], atol=1e-12)
        assert found.icr_debiased is None
        assert "shrunk by" in found.unavailable["icr_debiased"]


def test_principal_directions_are_those_of_the_means(h: np.ndarray) -> None:
    basis = principal_directions(ViewMoments(3, 8).update(torch.from_numpy(h)), 3).numpy()
    means = h.mean(1) - h.mean((0, 1))
    _, _, rows = np.linalg.svd(means)
    np.testing.assert_allclose(np.abs(np.sum(rows[:3].T * basis, 0)), 1, rtol=1e-9)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-12)
    with pytest.raises(ValueError, match="projection is 9; expected 1 to 8"):
        principal_directions(ViewMoments(3, 8).update(torch.from_numpy(h)), 9)


def test_monitors_log_companions_on_request(small_unet: nn.Module, digits: torch.Tensor) -> None:
    from sklearn.datasets import load_digits

    labels = torch.from_numpy(load_digits().target[:64])
    monitor = ICRMonitor(EDMDenoiser(small_unet), digits, Protocol(num_views=4), companions=NAMES, labels=labels)
    values = monitor.measure(1).values
    assert {f"repr/{name}" for name in NAMES} <= values.keys()
    features = monitor.reader.read(monitor.sections["repr", 0.29] and EDMDenoiser(small_unet), 0.29)
    assert values["repr/rankme"] == rankme(features)
    assert values["repr/nc1_classes"] == variability_ratio(features, labels)
    assert values["repr/silhouette"] == silhouette(features[:, 0], labels)
    assert 0 < values["repr/knn_accuracy"] < 1
    with pytest.raises(ValueError, match="companions is 'rank'; expected some of alignment"):
        ICRMonitor(EDMDenoiser(small_unet), digits, companions=["rank"])
    with pytest.raises(ValueError, match="companions is 'silhouette', which needs labels"):
        ICRMonitor(EDMDenoiser(small_unet), digits, companions=["silhouette"])
    one = ICRMonitor(EDMDenoiser(small_unet), digits, companions=["silhouette"], labels=torch.zeros(64, dtype=torch.long))
    assert "repr/silhouette" in one.measure(1).absent


def test_projection_and_shrinkage_serve_where_views_are_few(small_unet: nn.Module, digits: torch.Tensor) -> None:
    few = {"num_images": 16, "num_views": 2}
    denoiser = EDMDenoiser(small_unet)
    assert "repr/icr" in ICRMonitor(denoiser, digits, Protocol(**few)).measure(1).absent  # type: ignore[arg-type]
    shrunken = ICRMonitor(denoiser, digits, Protocol(**few, shrinkage="oas")).measure(1)  # type: ignore[arg-type]
    assert 0 < shrunken.values["repr/icr"] < 1
    assert "shrunk" in shrunken.absent["repr/icr_debiased"]
    monitor = ICRMonitor(denoiser, digits, Protocol(**few, projection=3))  # type: ignore[arg-type]
    untrained = monitor.measure(0)
    assert "the projection is fitted at the first measurement" in untrained.absent["repr/icr"]
    projected = monitor.measure(1)
    features = monitor.reader.read(denoiser, 0.29).double()
    basis = monitor.state_dict()["repr/basis"]
    assert projected.values["repr/icr"] == pytest.approx(icr(features @ basis).icr, rel=1e-9)
    assert projected.values["repr/icr_low"] < projected.values["repr/icr_debiased"] < projected.values["repr/icr_high"]
    again = ICRMonitor(denoiser, digits, Protocol(**few, projection=3))  # type: ignore[arg-type]
    again.load_state_dict(monitor.state_dict())
    assert again.measure(2).values["repr/icr_rise"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="projection is 33; expected at most 32, the width"):
        ICRMonitor(denoiser, digits, Protocol(projection=33))

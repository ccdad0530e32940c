"""The interval of ICR against the definition, simulation and its invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from mlflow_icr import ViewMoments, icr, icr_interval
from mlflow_icr.representation import interval_from_terms, leave_one_out_terms, paired_difference
from studies.validation.coverage import FAMILIES, measure_coverage
from tests.features import covariance, gaussian_features


@pytest.fixture
def features(rng: np.random.Generator) -> np.ndarray:
    return gaussian_features(rng, 70, 3, covariance(rng, 9), covariance(rng, 9), mean=50.0)


def terms_by_leaving_out(h: np.ndarray) -> np.ndarray:
    """The three terms of every image, from the definition: an inverse of its own for each."""
    n, k, d = h.shape
    sigma_t = np.cov(h.mean(1), rowvar=False)
    found = []
    for i in range(n):
        others = np.delete(h, i, 0)
        offsets = others.mean(0) - others.mean((0, 1))  # (K, D)
        r = others - others.mean(1, keepdims=True) - offsets
        inverse = np.linalg.inv(np.einsum("nkd,nke->de", r, r) / ((n - 2) * (k - 1)))
        t = h[i].mean(0) - others.mean((0, 1))
        mine = h[i] - h[i].mean(0) - offsets
        # Measured from the mean of the others, an image is further away by n / (n - 1) in the mean square.
        shrink = (n - 1) / n
        inner = inverse @ sigma_t @ inverse
        # Here, residuals are centred with the image itself in the mean, as in its own leverage.
        r_all = h[i] - h[i].mean(0) - (h.mean(0) - h.mean((0, 1)))
        found.append(
            (
                t @ inverse @ t * shrink,
                np.einsum("kd,de,ke->", mine, inverse, mine) / (k - 1) * shrink,
                np.einsum("kd,de,ke->", r_all, inner, r_all) / (k - 1) * (n / (n - 1)) * (n - 1) / (n - 2),
            )
        )
    return np.array(found) / d


def test_the_terms_are_those_of_leaving_each_image_out(features: np.ndarray) -> None:
    h = torch.from_numpy(features)
    terms = leave_one_out_terms(ViewMoments(3, 9).update(h), h).numpy()
    expected = terms_by_leaving_out(features)
    np.testing.assert_allclose(terms[:, :2], expected[:, :2], rtol=1e-9)
    # `spread` is only used relative to its mean.
    np.testing.assert_allclose(terms[:, 2] / terms[:, 2].mean(), expected[:, 2] / expected[:, 2].mean(), rtol=1e-9)


def test_the_interval_is_built_from_the_influences(features: np.ndarray) -> None:
    h = torch.from_numpy(features)
    found = icr_interval(h)
    assert found.value == icr(h).icr_debiased
    assert found.low < found.value < found.high
    assert float(found.influence.mean()) == pytest.approx(0, abs=1e-12)
    assert found.standard_error == pytest.approx(float(found.influence.std()) / 70**0.5, rel=1e-12)
    # Symmetric in the mean eigenvalue.
    low, centre, high = (1 / x - 1 for x in (found.high, found.centre, found.low))
    assert high - centre == pytest.approx(centre - low, rel=1e-9)
    reach = stats.t.ppf(0.975, 69) * found.standard_error / found.centre**2
    assert high - centre == pytest.approx(reach, rel=1e-9)
    wide, narrow = icr_interval(h, 0.99), icr_interval(h, 0.5)
    assert wide.low < found.low < narrow.low < narrow.high < found.high < wide.high


def test_the_influence_is_what_more_of_an_image_does(rng: np.random.Generator) -> None:
    """Against the plug-in ICR with one image counted slightly more: the definition of an influence."""
    h = gaussian_features(rng, 400, 4, covariance(rng, 6), covariance(rng, 6))
    found = icr_interval(torch.from_numpy(h))
    n, k, d = h.shape

    def weighted(weights: np.ndarray) -> float:
        w = weights / weights.sum()
        t = h.mean(1)
        e = h - t[:, None]
        t, e = t - w @ t, e - np.einsum("n,nkd->kd", w, e)
        sigma_xi = np.einsum("n,nkd,nke->de", w, e, e) / (k - 1)
        sigma_t = np.einsum("n,nd,ne->de", w, t, t)
        return float(1 / (1 + np.trace(np.linalg.solve(sigma_xi, sigma_t)) / d - 1 / k))

    step = 1e-4
    for i in range(0, n, 40):
        more = np.ones(n)
        more[i] += step * n
        slope = (weighted(more) - weighted(np.ones(n))) / step
        # nu / D = 200: leaving the image out changes its own term by about a hundredth of it.
        assert float(found.influence[i]) == pytest.approx(slope, rel=0.06, abs=0.02)


def test_it_does_not_depend_on_units_rotation_order_or_parts(features: np.ndarray, rng: np.random.Generator) -> None:
    h = torch.from_numpy(features)
    found = icr_interval(h)
    mixed = icr_interval(h @ torch.from_numpy(rng.standard_normal((9, 9))) * 1e3 + 7)
    order = torch.from_numpy(rng.permutation(70))
    shuffled = icr_interval(h[order])
    for other, influence in ((mixed, found.influence), (shuffled, found.influence[order])):
        for name in ("value", "low", "high", "standard_error", "centre"):
            assert getattr(other, name) == pytest.approx(getattr(found, name), rel=1e-8)
        torch.testing.assert_close(other.influence, influence, rtol=1e-7, atol=1e-10)
    moments = ViewMoments(3, 9).update(h)
    parts = torch.cat([leave_one_out_terms(moments, part) for part in h.split(17)])
    torch.testing.assert_close(interval_from_terms(moments.spectrum(), parts).influence, found.influence)


# 150 draws of a 95 % interval: 4 standard errors of the share are 0.07. The full simulation is `make validate`.
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_coverage_in_simulation(family: object) -> None:
    found = measure_coverage(family, 64, 4, 32, repeats=150, seed=1)  # type: ignore[arg-type]
    assert found.degrees_per_dimension > 4
    assert 0.88 <= found.coverage <= 1
    # The centre is without bias, where the plug-in value is not: its error is within 4 standard errors of the mean.
    assert abs(found.centre - found.truth) < 4 * found.deviation / 150**0.5 + 0.004
    assert found.plugin < found.truth - 0.03
    assert found.standard_error == pytest.approx(found.deviation, rel=0.3)


def test_heavy_tails_mislead_the_closed_form_and_not_the_centre() -> None:
    found = measure_coverage(FAMILIES[-1], 128, 4, 64, repeats=60, seed=2)
    assert abs(found.centre - found.truth) < 0.01
    assert found.debiased < found.truth - 0.03


def test_paired_differences_are_narrower_and_cover(rng: np.random.Generator) -> None:
    """Two steps whose features differ a little: what they share cancels."""
    d, n, k = 12, 100, 4
    sigma_s, sigma_xi = covariance(rng, d), covariance(rng, d)
    inverse = np.linalg.inv(sigma_xi)
    truth = [1 / (1 + np.trace(inverse @ sigma_s) * scale / d) for scale in (1.0, 0.9)]
    inside = 0
    for _ in range(200):
        h = gaussian_features(rng, n, k, sigma_s, sigma_xi)
        s = h.mean(1, keepdims=True)
        other = h - (1 - 0.9**0.5) * s  # nearly: the residuals' share in the mean is scaled too
        a, b = icr_interval(torch.from_numpy(h)), icr_interval(torch.from_numpy(other))
        low, high = paired_difference(a.influence, b.influence, b.value - a.value)
        # Exactly: t is scaled by sqrt(0.9), so tr(inv(xi) Sigma_t) is scaled by 0.9.
        total = np.trace(inverse @ sigma_s) / d + 1 / k
        exact = 1 / (1 + 0.9 * total - 1 / k) - truth[0]
        inside += low <= exact <= high
        assert high - low < 0.3 * (a.high - a.low)
    assert 0.9 <= inside / 200 <= 0.99


def test_what_cannot_be_is_refused(rng: np.random.Generator) -> None:
    h = torch.from_numpy(rng.standard_normal((20, 2, 30)))
    with pytest.raises(ValueError, match="19 degrees of freedom for D = 30"):
        icr_interval(h)
    with pytest.raises(ValueError, match=r"needs \(N-1\)\(K-1\) > D \+ 1"):
        icr_interval(torch.from_numpy(rng.standard_normal((21, 2, 19))))
    with pytest.raises(ValueError, match="level is 95; expected a number between 0 and 1"):
        icr_interval(torch.from_numpy(rng.standard_normal((40, 2, 5))), level=95)
    with pytest.raises(ValueError, match=r"expected \(N, K, D\)"):
        icr_interval(h[0])
    with pytest.raises(ValueError, match="expected the same images"):
        paired_difference(torch.zeros(4), torch.zeros(5), 0.1)

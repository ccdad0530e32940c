"""Protocol, monitors, schedule and summary."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from torch import nn

from mlflow_icr import (
    EDMDenoiser,
    GenerationMonitor,
    ICRMonitor,
    LossMonitor,
    Protocol,
    Report,
    geometric_schedule,
    icr,
    icr_interval,
    make_views,
    summarise,
)
from mlflow_icr.extraction.taps import Tap
from mlflow_icr.monitoring.errors import ErrorReader
from mlflow_icr.monitoring.generation_plots import trade_off
from mlflow_icr.monitoring.grid import CAPTION, image_grid
from mlflow_icr.monitoring.schedule import every_nth

PROTOCOL = Protocol(num_images=48, num_views=4)


def test_the_report_is_the_formula_on_the_tapped_features(small_unet: nn.Module, digits: torch.Tensor) -> None:
    denoiser = EDMDenoiser(small_unet)
    report = ICRMonitor(denoiser, digits, PROTOCOL, batch_size=32).measure(640)
    views = make_views(digits[:48], range(48), num_views=4, sigma=0.29, seed=0, level=3)
    with Tap(small_unet, "up_blocks.0") as tap:
        features = tap(lambda: denoiser(views.flatten(0, 1), 0.29)).view(48, 4, -1)
    raw, scaled = icr(features), icr(torch.nn.functional.normalize(features, dim=-1))
    interval = icr_interval(features)
    expected = {
        "repr/icr": raw.icr,
        "repr/icr_low": interval.low,
        "repr/icr_high": interval.high,
        "repr/icr_rise": 0,  # the first is the lowest
        "repr/icr_rise_low": 0,
        "repr/icr_rise_high": 0,
        "repr/icr_debiased": raw.icr_debiased,
        "repr/indefinite_fraction": raw.indefinite_fraction,
        "repr/trace_invariant": scaled.trace_invariant,
        "repr/trace_residual": scaled.trace_residual,
        "repr/fisher_residual_energy": scaled.fisher_residual_energy,
        "repr/fisher_invariant_energy": scaled.fisher_invariant_energy,
        "repr/fisher_residual_growth": 1,
    }
    # Another batch size rounds float32 convolutions differently; an ill-conditioned covariance magnifies it.
    found = {k: v for k, v in report.values.items() if k.removesuffix("_low") in expected or k in expected}
    assert found == pytest.approx(expected, rel=1e-3)
    influence = interval.influence.float().numpy()
    np.testing.assert_allclose(report.arrays["repr/influence"], influence, atol=2e-2 * np.abs(influence).max())
    unit = torch.nn.functional.normalize(features.double(), dim=-1).numpy()
    residuals = unit - unit.mean(1, keepdims=True) - unit.mean(0) + unit.mean((0, 1))
    shares = (residuals**2).sum((1, 2)) / (residuals**2).sum()
    np.testing.assert_allclose(report.arrays["repr/residual_share"], shares, rtol=1e-2)
    assert report.values["perf/measure_seconds"] > 0
    assert report.step == 640
    assert report.absent == {}


def test_measuring_twice_gives_the_same_and_changes_nothing(small_unet: nn.Module, digits: torch.Tensor) -> None:
    small_unet.train()
    torch.manual_seed(4)
    state, weights = torch.get_rng_state(), {k: v.clone() for k, v in small_unet.state_dict().items()}
    for cache in (512 * 2**20, 0):
        monitor = ICRMonitor(EDMDenoiser(small_unet), digits, PROTOCOL, cache_bytes=cache)
        first, second = (monitor.measure(step) for step in (1, 2))
        keys = [key for key in first.values if key.startswith("repr/")]
        assert [first.values[key] for key in keys] == [second.values[key] for key in keys]
    assert small_unet.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in small_unet.state_dict().items())
    small_unet.eval()


def test_ema_and_raw_weights_and_several_sigmas_are_told_apart(small_unet: nn.Module, digits: torch.Tensor) -> None:
    import copy

    other = copy.deepcopy(small_unet)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    protocol = Protocol(sigmas=(0.29, 0.6), num_images=48, num_views=4)
    values = ICRMonitor(EDMDenoiser(small_unet), digits, protocol, raw=EDMDenoiser(other)).measure(1).values
    alone = {
        "repr/icr": (small_unet, 0.29),
        "repr_raw/icr": (other, 0.29),
        "repr_sigma0.6/icr": (small_unet, 0.6),
        "repr_raw_sigma0.6/icr": (other, 0.6),
    }
    assert len({values[key] for key in alone}) == 4
    for key, (network, sigma) in alone.items():
        one = Protocol(sigmas=(sigma,), num_images=48, num_views=4)
        assert values[key] == ICRMonitor(EDMDenoiser(network), digits, one).measure(1).values["repr/icr"]


def test_growth_is_relative_to_the_first_trained_measurement(small_unet: nn.Module, digits: torch.Tensor) -> None:
    monitor = ICRMonitor(EDMDenoiser(small_unet), digits, PROTOCOL)
    assert "repr/fisher_residual_growth" not in monitor.measure(0).values
    assert monitor.measure(64).values["repr/fisher_residual_growth"] == pytest.approx(1, rel=1e-9)
    again = ICRMonitor(EDMDenoiser(small_unet), digits, PROTOCOL)
    state = monitor.state_dict() | {"repr/reference": 4 * monitor.state_dict()["repr/reference"]}
    again.load_state_dict(state)
    assert again.measure(128).values["repr/fisher_residual_growth"] == pytest.approx(0.25, rel=1e-9)


def test_the_number_of_views_follows_the_width(small_unet: nn.Module, digits: torch.Tensor) -> None:
    protocol = ICRMonitor(EDMDenoiser(small_unet), digits, Protocol(num_images=20)).protocol
    assert protocol.num_views == 8  # the smallest K with 19 (K - 1) >= 4 x 32
    assert Protocol().resolve(images=5000, dim=64).num_views == 2
    for n, d in ((300, 512), (64, 64), (2000, 1280), (4096, 512)):
        resolved = Protocol().resolve(images=n, dim=d)
        assert resolved.degrees_per_dimension(d) >= 4
        assert resolved.num_views is not None
        assert resolved.num_images == min(n, 1024)
        most = resolved.num_images - 1
        assert resolved.num_views == 2 or most * (resolved.num_views - 2) < 4 * d  # one view fewer would not do
    assert Protocol().resolve(images=8, dim=512).num_views == 64  # the most that is chosen unasked
    assert Protocol(projection=14).resolve(images=8, dim=512).num_views == 9  # 7 (K - 1) >= 4 x 14


def test_what_cannot_be_computed_is_absent_with_its_reason(small_unet: nn.Module, digits: torch.Tensor) -> None:
    few = ICRMonitor(EDMDenoiser(small_unet), digits, Protocol(num_images=10, num_views=2)).measure(1)
    assert not any(word in key for key in few.values for word in ("icr", "trace", "fisher", "indefinite"))
    assert "9 degrees of freedom for D = 32" in few.absent["repr/icr"]
    ridge = ICRMonitor(EDMDenoiser(small_unet), digits, Protocol(num_images=10, num_views=2, ridge=1e-3)).measure(1)
    assert 0 < ridge.values["repr/icr"] < 2
    assert "ridge" in ridge.absent["repr/icr_debiased"]
    monitor = ICRMonitor(EDMDenoiser(small_unet), digits, PROTOCOL)
    with torch.no_grad():
        weight = small_unet.conv_in.weight
        kept = weight.clone()
        weight.fill_(float("nan"))
        diverged = monitor.measure(1)
        samples = GenerationMonitor(EDMDenoiser(small_unet), digits, num_samples=4, num_steps=2).measure(1)
        weight.copy_(kept)
    assert "repr/icr" not in diverged.values
    assert "NaN or Inf in 48 of 48 images" in diverged.absent["repr/icr"]
    assert diverged.absent.keys() >= {"repr/icr_debiased", "repr/trace_residual", "repr/fisher_residual_growth"}
    assert "4 of 4 samples hold NaN" in samples.absent["mem/ratio_l2"]
    assert samples.values == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": ""}, "layer is ''; expected a module path or an alias"),
        ({"sigmas": ()}, "sigmas is (); expected positive finite numbers"),
        ({"sigmas": (0.3, -1)}, "sigmas is (0.3, -1)"),
        ({"sigmas": (0.3, 0.3)}, "different numbers"),
        ({"augmentation_level": 0}, "augmentation_level is 0; expected one of 1, 2, 3, 4, 5"),
        ({"num_images": 1}, "num_images is 1; expected a whole number >= 2, or None for all"),
        ({"num_views": 2.5}, "num_views is 2.5; expected a whole number >= 2, or None for automatic"),
        ({"seed": -1}, "seed is -1"),
        ({"ridge": float("nan")}, "ridge is nan"),
        ({"normalisation": "l1"}, "normalisation is 'l1'; expected one of l2, none"),
        ({"projection": 0}, "projection is 0; expected a whole number >= 1, or None"),
        ({"shrinkage": "lw"}, "shrinkage is 'lw'; expected one of none, ledoit-wolf, oas"),
        ({"shrinkage": "oas", "ridge": 0.1}, "ridge is 0.1; expected 0 where shrinkage is given"),
    ],
)
def test_impossible_protocols_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Protocol(**fields)  # type: ignore[arg-type]


def test_protocols_are_frozen_and_their_digest_is_theirs(small_unet: nn.Module, digits: torch.Tensor) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROTOCOL.seed = 3  # type: ignore[misc]
    assert Protocol(sigmas=0.29).digest == Protocol(sigmas=(0.29,)).digest  # type: ignore[arg-type]
    changed = [
        dataclasses.replace(PROTOCOL, **{k: v})
        for k, v in {"seed": 1, "num_views": 3, "sigmas": (0.1,), "layer": "mid"}.items()
    ]
    assert len({p.digest for p in [PROTOCOL, *changed]}) == 5
    with pytest.raises(ValueError, match="num_images is 65; expected 2 to 64, the number of images given"):
        ICRMonitor(EDMDenoiser(small_unet), digits, Protocol(num_images=65))
    with pytest.raises(ValueError, match="layer is 'nowhere'"):
        ICRMonitor(EDMDenoiser(small_unet), digits, Protocol(layer="nowhere"))


def test_reports_hold_finite_values_only() -> None:
    with pytest.raises(ValueError, match="repr/icr is nan"):
        Report(1, {"repr/icr": float("nan")})
    with pytest.raises(ValueError, match="step is -1"):
        Report(-1, {})
    with pytest.raises(ValueError, match="both a value and a reason"):
        Report(1, {"a": 1.0}, absent={"a": "no"})
    joined = Report(8, {"a": 1.0}, protocol_digest="x").joined(Report(8, {"b": 2.0}, absent={"c": "why"}))
    assert joined.flat() == {"images_seen": 8, "a": 1.0, "b": 2.0}
    assert (joined.absent, joined.protocol_digest) == ({"c": "why"}, "x")
    with pytest.raises(ValueError, match="step 8 and step 9"):
        joined.joined(Report(9, {}))


def test_the_schedule_is_geometric_in_images_seen() -> None:
    points = geometric_schedule(1_000_000, first=1000, count=13, granularity=1)
    assert points[0] == 0
    assert (points[1], points[-1]) == (1000, 1_000_000)
    ratios = np.divide(points[2:], points[1:-1])
    np.testing.assert_allclose(ratios, 1000 ** (1 / 12), rtol=1e-3)  # rounded to whole images
    batches = geometric_schedule(130_000, first=2000, count=17, granularity=64)
    assert all(p % 64 == 0 for p in batches)
    assert batches[-1] == 130_048
    assert len(batches) == 18
    assert geometric_schedule(10, first=1, count=50, granularity=5) == (0, 5, 10)
    for bad in (
        {"first": 0, "count": 3},
        {"first": 11, "count": 3},
        {"first": 1, "count": 1},
        {"first": 1, "count": 2, "granularity": 0},
    ):
        with pytest.raises(ValueError, match="expected"):
            geometric_schedule(10, **bad)


def test_losses_are_those_of_the_trainer_on_the_same_noise(small_unet: nn.Module, digits: torch.Tensor) -> None:
    from functools import partial

    from trainers.families.edm import edm_loss, training_sigma

    denoiser = EDMDenoiser(small_unet)
    loss, draw = partial(edm_loss, denoiser, sigma_data=0.5), partial(training_sigma, p_mean=-1.2, p_std=1.2)
    monitor = LossMonitor(denoiser, loss, draw, digits[:20], digits[20:30], draws=2, batch_size=7)
    values = monitor.measure(3).values
    assert values == monitor.measure(4).values
    assert values["loss/gap"] == values["loss/heldout"] - values["loss/train_eval"]
    x = (digits[20:30].float() / 127.5 - 1).repeat(2, 1, 1, 1)
    with torch.no_grad():
        expected = float(loss(x, monitor.sigma, monitor.noise))
    assert values["loss/heldout"] == pytest.approx(expected, rel=1e-5)  # float32 means of other batches
    same = LossMonitor(denoiser, loss, draw, digits[:20], digits[:20]).measure(1).values
    assert same["loss/gap"] == 0
    with torch.no_grad():
        kept = small_unet.conv_in.weight.clone()
        small_unet.conv_in.weight.fill_(float("nan"))
        broken = monitor.measure(5)
        small_unet.conv_in.weight.copy_(kept)
    assert broken.values == {}
    assert broken.absent.keys() == {"loss/train_eval", "loss/heldout", "loss/gap"}
    with pytest.raises(ValueError, match="draws 0; expected at least 1"):
        LossMonitor(denoiser, loss, draw, digits, digits, draws=0)


def test_denoising_errors_are_those_of_images_and_views(small_unet: nn.Module, digits: torch.Tensor) -> None:
    """A denoiser that knows the training images exactly, and sees grey in everything else."""

    class Knows:
        network = small_unet

        def __call__(self, x: torch.Tensor, sigma: object) -> torch.Tensor:
            known = digits.float() / 127.5 - 1
            distance, nearest = torch.cdist(x.flatten(1), known.flatten(1)).min(1)
            return torch.where((distance < 1).view(-1, 1, 1, 1), known[nearest] + 0.01, torch.zeros_like(x))

    protocol = Protocol(num_images=40, num_views=2, sigmas=(0.001,)).resolve(images=40, dim=32)
    found = ErrorReader(digits[:40], protocol, batch_size=17, heldout=digits[40:60]).read(Knows(), 0.001)
    assert found.image.shape == found.far.shape == (40,)
    assert found.image.tolist() == pytest.approx([1e-4] * 40, rel=1e-3)
    # A near view is still known for the image that it came from, and is so far from it, and from a far view's grey.
    assert found.near.tolist() == pytest.approx((found.near_way + 1e-4).tolist(), rel=0.1)
    assert (found.far > 10 * found.near).all()
    assert found.heldout.tolist() == pytest.approx([1e-4] * 20, rel=1e-3)  # the denoiser knows all 64
    whole = ErrorReader(digits[:40], protocol, batch_size=512).read(EDMDenoiser(small_unet), 0.3)
    parts = ErrorReader(digits[:40], protocol, batch_size=20).read(EDMDenoiser(small_unet), 0.3)
    for name in ("image", "near", "far", "near_way", "far_way", "other"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-4, atol=1e-7)


def test_errors_are_reported_at_levels_and_as_training_allows(small_unet: nn.Module, digits: torch.Tensor) -> None:
    few = {"num_images": 48, "num_views": 4}
    report = ICRMonitor(EDMDenoiser(small_unet), digits[:48], Protocol(**few), heldout=digits[48:]).measure(1)  # type: ignore[arg-type]
    for end in ("", "_x0.5", "_x2", "_x4"):
        ratios = [f"{kind}_error_ratio" for kind in ("view", "near", "far", "heldout")]
        for key in (*ratios, "view_auc", "view_excess", "heldout_auc"):
            low, value, high = (report.values[f"repr/{key}{part}{end}"] for part in ("_low", "", "_high"))
            assert low < value < high, (key, end)
        assert report.arrays[f"repr/view_log_ratio{end}"].shape == (48,)
    flips = ICRMonitor(EDMDenoiser(small_unet), digits, Protocol(**few, training_augmentations=("flip",)))  # type: ignore[arg-type]
    assert flips.protocol.digest != Protocol(**few).digest  # type: ignore[arg-type]
    values = flips.measure(1).values
    assert values["repr/view_error_ratio"] == report.values["repr/view_error_ratio"]  # never flipped
    assert values["repr/far_error_ratio"] != report.values["repr/far_error_ratio"]
    assert report.values["repr/view_error_ratio"] == report.values["repr/near_error_ratio"]
    assert report.values["repr/far_bias"] > 1.5  # of digits, which are aligned
    shifts = ICRMonitor(EDMDenoiser(small_unet), digits, Protocol(**few, training_augmentations=("shift",))).measure(1)  # type: ignore[arg-type]
    assert "training_augmentations is shift" in shifts.absent["repr/near_error_ratio"]
    assert shifts.values["repr/view_error_ratio"] == shifts.values["repr/far_error_ratio"]
    photographs = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)).mul(0.1).add(0.5).clamp(0, 1)
    assert ErrorReader(photographs, Protocol().resolve(images=64, dim=4), 64).chosen == "far"  # nothing in them has a place
    with pytest.raises(ValueError, match=r"training_augmentations is \('crop',\); expected some of flip, shift"):
        Protocol(training_augmentations=("crop",))


def rows(icrs: list[float], ratios: list[float]) -> list[dict[str, float]]:
    return [
        {"images_seen": i * 10, "repr/icr": a, "mem/ratio_l2": b} for i, (a, b) in enumerate(zip(icrs, ratios, strict=True))
    ]


def test_summaries() -> None:
    full = summarise(rows([0.9, 0.8, 0.7, 0.7, 0.8, 0.9], [0, 0, 0.06, 0.05, 0.2, 0.5]))
    # The onset is where the ratio *stays* above 0.05; of two equal minima the first is meant.
    assert full == {"icr_min": 0.7, "icr_min_images_seen": 20, "mem_onset_images_seen": 40, "lead_images": 20}
    assert summarise(rows([0.9, 0.8], [0, 0.04])) == {"icr_min": 0.8, "icr_min_images_seen": 10}
    assert summarise([{"images_seen": 5, "mem/ratio_l2": 1.0}]) == {"mem_onset_images_seen": 5}
    assert summarise([]) == {}


def test_generated_images_are_judged(small_unet: nn.Module, digits: torch.Tensor) -> None:
    class Copier:
        """A denoiser that knows two images only, and sees the nearer of them in everything."""

        network = small_unet

        def __call__(self, x: torch.Tensor, sigma: object) -> torch.Tensor:
            known = digits[:2].float() / 127.5 - 1
            return known[torch.cdist(x.flatten(1), known.flatten(1)).argmin(1)]

    copier = GenerationMonitor(Copier(), digits[:40], digits[40:], num_samples=80, num_steps=8)
    report = copier.measure(7)
    assert report.values["mem/ratio_l2"] == 1
    assert report.values["mem/ratio_l2_low"] == pytest.approx(0.025 ** (1 / 80))  # Clopper and Pearson's bound of 80 of 80
    assert report.values["mem/authpct"] == 0
    assert "of 80 and 24 images in 64 dimensions: too few for a covariance" in report.warnings["gen/fd_pixels"]
    assert report.values["gen/fd_gap_pixels"] == report.values["gen/fd_pixels"] - report.values["gen/fd_train_pixels"]
    assert report.values["gen/vendi"] <= 2
    assert report.figures["nearest"].shape == (2 * (48 + 2 + 48 + CAPTION + 2) - 2, 8 * 50 - 2, 3)
    top, below = report.figures["nearest"][:48, :48], report.figures["nearest"][50:98, :48]
    assert np.array_equal(top, below)  # a copy above what it copies
    assert (report.figures["nearest"][98 : 98 + CAPTION, :48] < 128).any()  # the ratio, in dark letters
    known, x = digits[:40].flatten(1).double() / 255, copier.sample().flatten(1).double() / 255
    expected = torch.cdist(x, known).min(1).values
    np.testing.assert_allclose(report.distributions["mem/distance_pixels"], expected, atol=1e-6)
    own = torch.cdist(known, known).fill_diagonal_(torch.inf).min(1).values
    np.testing.assert_allclose(report.distributions["mem/distance_pixels_train"], own, rtol=1e-6)
    assert report.figures["distances"].ndim == 3
    assert {tuple(i.flatten().tolist()) for i in copier.sample()} == {tuple(i.flatten().tolist()) for i in digits[:2]}
    picture = report.figures["samples"]
    assert picture.dtype == np.uint8
    assert picture.shape == (4 * 50 - 2, 16 * 50 - 2, 3)

    small_unet.train()
    untrained = GenerationMonitor(EDMDenoiser(small_unet), digits[:40], num_samples=70, num_steps=3)
    first, second = untrained.measure(0), untrained.measure(1)
    assert first.values["mem/ratio_l2"] == 0
    judged = {k: v for k, v in first.values.items() if not k.startswith("perf/")}
    assert judged == {k: v for k, v in second.values.items() if not k.startswith("perf/")}
    assert np.array_equal(first.figures["samples"], second.figures["samples"])
    assert "no held-out images" in first.absent["gen/fd_pixels"]
    assert small_unet.training
    small_unet.eval()


def test_quality_is_drawn_against_copies_where_both_were_measured() -> None:
    rows = [{"images_seen": 0, "mem/ratio_l2": 0.0, "gen/fd_pixels": 50.0}]
    rows += [{"images_seen": s, "mem/ratio_l2": s / 1000, "gen/fd_train_pixels": 9.0 - s / 100} for s in (100, 200)]
    assert trade_off(rows[:2], "pixels") is None
    train_alone = trade_off(rows, "pixels")
    assert train_alone is not None
    rows += [{"images_seen": s, "mem/ratio_l2": s / 1000, "gen/kid_pixels": -1e-3 * s} for s in (400, 800)]
    both = trade_off([*rows, {"images_seen": 900}], "pixels")
    assert both is not None
    assert both.shape[1] == 2 * train_alone.shape[1]  # a panel each
    assert trade_off([{"images_seen": 5, "repr/icr": 0.1}], "pixels") is None


def test_a_sparser_schedule_keeps_the_end() -> None:
    assert every_nth((0, 1, 2, 3, 4, 5), 2) == (1, 3, 5)
    assert every_nth((0, 1, 2, 3), 1) == (0, 1, 2, 3)
    assert every_nth((0, 7), 5) == (7,)
    with pytest.raises(ValueError, match="n is 0; expected at least 1"):
        every_nth((0,), 0)


def test_grids_place_images_row_by_row() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 60, 60) * 10
    grid = image_grid(images, 3)
    assert grid.shape == (122, 184, 3)
    assert [int(grid[30, c, 0]) for c in (30, 92, 154)] == [0, 10, 20]
    assert [int(grid[92, c, 0]) for c in (30, 92, 154)] == [30, 40, 255]
    with pytest.raises(ValueError, match="N >= 1"):
        image_grid(images[:0], 3)

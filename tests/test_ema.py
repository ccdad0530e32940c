"""Power-function averages: their profile, and any width reconstructed from snapshots of two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import integrate

from mlflow_icr.cli import main
from mlflow_icr.extraction.averages import (
    SNAPSHOTS,
    WEIGHTS,
    Profile,
    coefficients,
    exponent_of,
    inner_products,
    power_beta,
    reconstructed,
    snapshots_of,
    width_of,
)


def profile(p: Profile, s: np.ndarray) -> np.ndarray:
    g = exponent_of(p.std)
    return np.where(s <= p.images_seen, (g + 1) * (s / p.images_seen) ** g / p.images_seen, 0.0)


def test_widths_and_exponents_are_those_of_the_paper() -> None:
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.01)  # Karras et al. 2024, section 3.1
    assert exponent_of(0.10) == pytest.approx(6.94, abs=0.01)
    s = np.linspace(0, 1, 200_001)
    weights = profile(Profile(0.08, 1.0), s)
    mean = integrate.trapezoid(weights * s, s)
    assert integrate.trapezoid(weights * (s - mean) ** 2, s) ** 0.5 == pytest.approx(0.08, rel=1e-6)
    assert width_of(exponent_of(0.13)) == pytest.approx(0.13)
    for std in (0.0, 0.3):
        with pytest.raises(ValueError, match="expected a relative width in"):
            exponent_of(std)


def test_steps_of_the_average_make_its_profile() -> None:
    """Weights that are time itself: their average is the profile's mean, (gamma + 1) / (gamma + 2)."""
    average, batch = 0.0, 4
    for seen in range(batch, 40_001, batch):
        average += (1 - power_beta(0.1, seen, batch)) * (seen - average)
    g = exponent_of(0.1)
    assert average / 40_000 == pytest.approx((g + 1) / (g + 2), rel=1e-3)


def test_inner_products_are_the_integrals() -> None:
    profiles = [Profile(0.05, 900.0), Profile(0.1, 400.0), Profile(0.15, 900.0)]
    found = inner_products(profiles, profiles)
    for i, a in enumerate(profiles):
        for j, b in enumerate(profiles):
            area, _ = integrate.quad(lambda s, a=a, b=b: profile(a, s) * profile(b, s), 0, min(a.images_seen, b.images_seen))
            assert found[i, j] == pytest.approx(area, rel=1e-6)


def test_other_widths_and_times_come_from_snapshots_of_two() -> None:
    """The weights walk at random; an average of each width is kept beside, which the snapshots are to give."""
    generator, batch, kept = np.random.default_rng(0), 1, (0.05, 0.1)
    walk, averages = np.zeros(64), {std: np.zeros(64) for std in (*kept, 0.07, 0.12)}
    snapshots, truth = {}, {}
    for seen in range(1, 4001):
        walk = walk + generator.standard_normal(64)
        for std, average in averages.items():
            average += (1 - power_beta(std, seen, batch)) * (walk - average)
        if seen % 250 == 0:
            snapshots.update({Profile(std, seen): averages[std].copy() for std in kept})
            truth.update({(std, seen): averages[std].copy() for std in (0.07, 0.12)})
    for wanted in ((0.07, 4000), (0.12, 4000), (0.07, 3000)):
        shares, error = coefficients(list(snapshots), Profile(*wanted))
        assert error < 0.02
        assert shares.sum() == pytest.approx(1, abs=0.01)
        made = sum(share * weights for share, weights in zip(shares, snapshots.values(), strict=True))
        assert np.linalg.norm(made - truth[wanted]) < 0.02 * np.linalg.norm(truth[wanted])
    same, error = coefficients(list(snapshots), Profile(0.05, 4000))
    assert error < 1e-5
    assert same[list(snapshots).index(Profile(0.05, 4000))] == pytest.approx(1, abs=1e-3)
    one_width = [p for p in snapshots if p.std == 0.05 and p.images_seen == 4000]
    assert coefficients(one_width, Profile(0.12, 4000))[1] > 0.3  # what cannot be said is not said to be


def test_the_command_writes_a_folder_with_the_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    for seen in (0, 100, 200, 300):
        place = folder / f"{seen:012d}"
        (place / "unet").mkdir(parents=True)
        (place / "model_index.json").write_text("{}")
        save_file({"w": torch.full((2,), -1.0)}, place / "unet" / WEIGHTS)
        save_file({f"{std}/unet/w": torch.full((2,), float(seen)) for std in ("0.05", "0.1")}, place / SNAPSHOTS)
    assert main(["ema", str(folder), "--std", "0.05"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "ema-0.05")
    assert "from 6 snapshots" in printed.err
    torch.testing.assert_close(load_file(tmp_path / "ema-0.05" / "unet" / WEIGHTS)["w"], torch.full((2,), 300.0))
    assert not (tmp_path / "ema-0.05" / SNAPSHOTS).exists()
    found, _ = reconstructed(snapshots_of(tmp_path), Profile(0.1, 200))
    torch.testing.assert_close(found["unet"]["w"], torch.full((2,), 200.0))
    for flags, line in (
        (["--std", "0.4"], "std is 0.4; expected a relative width"),
        (["--std", "0.05"], "which is there already"),
        (
            ["--std", "0.05", "--images-seen", "400", "--output", str(tmp_path / "new")],
            "images_seen is 400; expected at most 300",
        ),
    ):
        assert main(["ema", str(folder), *flags]) == 2
        assert line in capsys.readouterr().err
    assert main(["ema", str(tmp_path / "nothing"), "--std", "0.05"]) == 2
    assert "which holds no power_averages.safetensors" in capsys.readouterr().err

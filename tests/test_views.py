"""Views: the same whatever makes them, in range, and what each level adds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlflow_icr.extraction.keyed import keyed_generator
from mlflow_icr.extraction.views import AUGMENTATION_LEVELS, as_unit_interval, make_views


@pytest.fixture
def colour(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, 256, (12, 3, 16, 12), dtype=np.uint8))


@pytest.mark.parametrize("level", AUGMENTATION_LEVELS)
def test_a_view_does_not_depend_on_its_batch(colour: torch.Tensor, level: int) -> None:
    options = {"sigma": 0.3, "seed": 5, "level": level}
    whole = make_views(colour, range(12), num_views=3, **options)
    assert whole.shape == (12, 3, 3, 16, 12)
    for split in ([0], [4, 9, 2], list(range(11, -1, -1))):
        assert torch.equal(make_views(colour[split], split, num_views=3, **options), whole[split])
    # More views, as another rank's share or another K: the first ones stay what they are.
    assert torch.equal(make_views(colour, range(12), num_views=1, **options), whole[:, :1])


def test_views_neither_read_nor_move_the_global_generators(colour: torch.Tensor) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make_views(colour, range(12), num_views=2, sigma=0.3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(make_views(colour, range(12), num_views=2, sigma=0.3, seed=0), first)


def test_seed_image_and_view_each_change_the_draw(digits: torch.Tensor) -> None:
    same = digits[:1].repeat(4, 1, 1, 1)
    a = make_views(same, range(4), num_views=4, sigma=0.5, seed=0).flatten(0, 1).flatten(1)
    b = make_views(same, range(4), num_views=4, sigma=0.5, seed=1).flatten(0, 1).flatten(1)
    assert torch.pdist(torch.cat([a, b])).min() > 1


def test_noise_is_unit_noise_times_sigma(digits: torch.Tensor) -> None:
    clean = make_views(digits, range(64), num_views=8, sigma=0, seed=0)
    small = make_views(digits, range(64), num_views=8, sigma=0.1, seed=0) - clean
    large = make_views(digits, range(64), num_views=8, sigma=2.0, seed=0) - clean
    assert clean.min() >= -1
    assert clean.max() <= 1
    torch.testing.assert_close(large, 20 * small, atol=1e-5, rtol=1e-4)  # float32 differences of numbers near 1
    count = large.numel()
    assert large.mean().abs() < 4 * 2 / count**0.5
    assert large.std() == pytest.approx(2, rel=4 / (2 * count) ** 0.5)


def test_uint8_and_unit_floats_are_the_same_images(colour: torch.Tensor) -> None:
    options = {"num_views": 2, "sigma": 0.2, "seed": 3}
    assert torch.equal(make_views(colour, range(12), **options), make_views(colour.float() / 255, range(12), **options))


def test_levels_nest(colour: torch.Tensor) -> None:
    """Each level changes the images, and a level's crop is that of the levels below it."""
    views = {level: make_views(colour, range(12), num_views=8, sigma=0, seed=0, level=level) for level in AUGMENTATION_LEVELS}
    same = (views[1] == views[2]).flatten(2).all(2)
    assert 0.3 < same.double().mean() < 0.7  # an unflipped half is level 1's own crop
    torch.testing.assert_close(
        views[2][~same], views[1][~same].flip(-1), atol=1e-5, rtol=0
    )  # the other half is its mirror image
    for level in (3, 4, 5):
        assert (views[level] - views[level - 1]).abs().mean() > 0.02


def test_a_constant_image_stays_constant_under_geometry() -> None:
    grey = torch.full((3, 1, 9, 9), 0.25)
    torch.testing.assert_close(
        make_views(grey, range(3), num_views=4, sigma=0, seed=0, level=2), torch.full((3, 4, 1, 9, 9), -0.5)
    )


def test_rotation_does_not_shear_wide_images() -> None:
    """A distance between two points of a rotated, uncropped view is the distance in the image, in pixels."""
    from mlflow_icr.extraction import views as module

    uniform = torch.full((1, module.NUM_PARAMETERS), 0.5, dtype=torch.float64)
    uniform[0, 0] = 1.0  # the whole area; 0.5 elsewhere: no stretch, no flip; and 15 degrees of rotation
    uniform[0, 9] = 1.0
    height, width = 10, 30
    matrix = module._sampling_matrices(uniform, 4, height, width)[0, :, :2].numpy()
    to_pixels = np.diag([width / 2, height / 2])
    pixels = to_pixels @ matrix @ np.linalg.inv(to_pixels)
    np.testing.assert_allclose(pixels @ pixels.T, np.eye(2), atol=1e-12)
    assert np.degrees(np.arctan2(pixels[1, 0], pixels[0, 0])) == pytest.approx(module.ROTATION_DEGREES)


def test_colour_jitter_keeps_grey_pictures_grey_in_rgb() -> None:
    grey = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 3, 1, 1)
    views = make_views(grey, range(6), num_views=4, sigma=0, seed=0)
    torch.testing.assert_close(views[:, :, 0], views[:, :, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(views[:, :, 0], views[:, :, 2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_any_number_of_channels(channels: int) -> None:
    images = torch.rand(3, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    for level in AUGMENTATION_LEVELS:
        views = make_views(images, range(3), num_views=2, sigma=0.0, seed=0, level=level)
        assert views.shape == (3, 2, channels, 8, 8)
        assert views.isfinite().all()
        assert views.abs().max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": 6}, "level is 6; expected one of 1, 2, 3, 4, 5"),
        ({"sigma": -0.1}, "sigma is -0.1; expected a finite number >= 0"),
        ({"sigma": float("nan")}, "sigma is nan"),
        ({"num_views": 0}, "num_views is 0"),
        ({"indices": range(3)}, "3 indices for 12 images"),
        ({"images": torch.zeros(12, 8, 8)}, r"shape \(12, 8, 8\); expected \(N, C, H, W\)"),
        ({"images": torch.full((12, 1, 8, 8), -1.0)}, r"range from -1 to -1; expected floats in \[0, 1\] or uint8"),
        ({"images": torch.full((12, 1, 8, 8), float("nan"))}, "range from nan"),
        ({"images": torch.zeros(12, 1, 8, 8, dtype=torch.int32)}, "dtype torch.int32; expected uint8"),
    ],
)
def test_bad_input_is_refused(colour: torch.Tensor, change: dict[str, object], message: str) -> None:
    arguments = {"images": colour, "indices": range(12), "num_views": 2, "sigma": 0.3, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        make_views(arguments.pop("images"), arguments.pop("indices"), **arguments)  # type: ignore[arg-type]


def test_unit_interval_takes_empty_sets() -> None:
    assert as_unit_interval(torch.zeros(0, 1, 4, 4)).shape == (0, 1, 4, 4)


def test_keys_are_independent_streams() -> None:
    draws = np.stack([keyed_generator("view", s, i, k).standard_normal(2000) for s in (0, 1) for i in (0, 1) for k in (0, 1)])
    correlations = np.corrcoef(draws)[np.triu_indices(8, 1)]
    assert np.abs(correlations).max() < 4.5 / 2000**0.5
    assert not np.array_equal(keyed_generator("train", 0, 0).random(4), keyed_generator("view", 0, 0).random(4))
    assert np.array_equal(keyed_generator("view", 0, 7).random(4), keyed_generator("view", np.int64(0), np.int64(7)).random(4))

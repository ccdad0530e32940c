"""Values of presets for the benchmarks' own loops: the side of square images, and the deviation of data for EDM."""

from __future__ import annotations

from trainers.config import TrainConfig


def side_of(config: TrainConfig) -> int:
    """The side in pixels of a preset's images."""
    assert isinstance(config.data.resolution, int)
    return config.data.resolution


def sigma_data_of(config: TrainConfig) -> float:
    """The standard deviation of the data in a preset of the family EDM."""
    assert config.noise.sigma_data is not None
    return config.noise.sigma_data

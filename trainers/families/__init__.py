"""Model families: what is trained, on which noise, and how it is sampled and saved; one small file each."""

from __future__ import annotations

from trainers.config import TrainConfig
from trainers.families.base import Family
from trainers.families.ddpm import DDPM
from trainers.families.edm import EDM
from trainers.families.flow import Flow

__all__ = ["Family", "family_of"]


def family_of(config: TrainConfig, num_classes: int | None = None) -> Family:
    """The family of a configuration; `num_classes` is the number of classes in its data, for a model of classes."""
    kinds: dict[str, type[Family]] = {"edm": EDM, "ddpm": DDPM, "flow": Flow}
    return kinds[config.network.family](config, num_classes if config.network.labels else None)

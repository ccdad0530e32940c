"""The configuration of a run: its groups of options, from presets, files and flags, checked together before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from mlflow_icr import Protocol
from mlflow_icr.arguments import refuse_unknown
from mlflow_icr.extraction.averages import check_std
from mlflow_icr.extraction.encoders import is_installed
from mlflow_icr.extraction.images import Size, height_width
from trainers.augmentation import EDM, TRAINED_VIEWS
from trainers.groups import DataConfig, MonitorConfig, NetworkConfig, NoiseConfig, OptimizerConfig, RunConfig
from trainers.options import FAMILIES, TRANSFORMER, Group, Option, is_required, options_of, refuse, used_values

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes; refuses impossible values and combinations.

    Raises ValueError naming field, value and what is allowed.
    """

    data: DataConfig
    network: NetworkConfig
    optimizer: OptimizerConfig
    noise: NoiseConfig
    monitor: MonitorConfig
    run: RunConfig
    preset: str = ""  # that it was made from; empty for none

    def __post_init__(self) -> None:
        optimizer, monitor = self.optimizer, self.monitor
        self._check_network()
        if self.network.autoencoder and self.data.augment == EDM:
            refuse("augment", EDM, "flip or nothing with autoencoder: latents are encoded once, not in each of many places")
        if not self.network.autoencoder:
            self.check_network(self.data.size)
        if optimizer.batch_size % optimizer.gradient_accumulation_steps:
            parts = optimizer.gradient_accumulation_steps
            refuse("batch_size", optimizer.batch_size, f"a multiple of gradient_accumulation_steps, {parts}")
        if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
            refuse("betas", optimizer.betas, "two numbers in [0, 1)")
        for std in optimizer.power_ema_stds:
            check_std("power_ema_stds", std)
        if monitor.first_measurement_kimg > optimizer.total_kimg:
            refuse("first_measurement_kimg", monitor.first_measurement_kimg, f"at most total_kimg, {optimizer.total_kimg:g}")
        try:
            self.protocol()
        except ValueError as error:
            ours = {"num_images": "probe_images", "num_views": "probe_views"}
            name, rest = str(error).split(" ", 1)
            raise ValueError(f"{ours.get(name, name)} {rest}") from None

    def _check_network(self) -> None:
        network = self.network
        for name, entry in OPTIONS.items():
            if (why := entry.unused_by(network.family, network.kind)) and (value := self.get(name)) != entry.default:
                refuse(name, value, why)
        if not network.block_channels or any(c < 8 or c % 8 for c in network.block_channels):
            refuse("block_channels", network.block_channels, "positive multiples of 8, one for each resolution")
        if network.lora_rank and not network.init_from:
            refuse("lora_rank", network.lora_rank, "0 without init_from, whose network it changes")
        if network.hidden_size % (4 * network.num_heads):
            refuse("hidden_size", network.hidden_size, f"a multiple of {4 * network.num_heads}, four times num_heads")

    def check_ranks(self, ranks: int, parts: int | None = None) -> None:
        """Raise ValueError where the batch cannot be divided among ranks and accumulated parts (None: this configuration's)."""
        share = ranks * (parts or self.optimizer.gradient_accumulation_steps)
        if self.optimizer.batch_size % share:
            allowed = f"a multiple of {share}, the ranks times gradient_accumulation_steps"
            refuse("batch_size", self.optimizer.batch_size, allowed)

    def check_network(self, size: Size) -> None:
        """Raise ValueError where the network does not fit what it is trained on, images or latents of this size."""
        network, resolution = self.network, self.data.resolution
        height, width = height_width(size)
        what = "" if size == self.data.size else f", which makes latents of {height}x{width}"
        if network.kind == TRANSFORMER:
            if height != width:
                refuse("resolution", resolution, f"a square for family {network.family}, whose network takes no other images")
            if height % network.patch_size:
                raise ValueError(f"resolution is {resolution}{what}; expected a multiple of patch_size, {network.patch_size}")
            return
        blocks = len(network.block_channels)
        unit = 2 ** (blocks - 1)
        if height % unit or width % unit:
            raise ValueError(f"resolution is {resolution}{what}; expected a multiple of {unit} for {blocks} blocks")
        levels = [min(height, width) // 2**i for i in range(blocks)]
        if not set(network.attention_resolutions) <= set(levels):
            allowed = f"some of {', '.join(map(str, levels))}, the resolutions of the blocks"
            refuse("attention_resolutions", network.attention_resolutions, allowed)

    def protocol(self) -> Protocol:
        """The protocol of this run's monitor."""
        c, num_images = self.monitor, self.data.num_images
        return Protocol(
            layer=c.layer,
            sigmas=c.sigmas,
            augmentation_level=c.augmentation_level,
            num_images=min(c.probe_images, num_images) if c.probe_images >= 2 else c.probe_images,
            num_views=c.probe_views or None,
            projection=c.projection or None,
            shrinkage=c.shrinkage,
            training_augmentations=TRAINED_VIEWS[self.data.augment],
        )

    @property
    def total_images(self) -> int:
        """Images seen at the end, before rounding up to whole batches."""
        return round(self.optimizer.total_kimg * 1000)

    def get(self, name: str) -> Any:
        """The value of a flat name."""
        if name == PRESET.name:
            return self.preset
        return getattr(getattr(self, OPTIONS[name].group), OPTIONS[name].attribute)

    def changed(self, **changes: Any) -> TrainConfig:
        """The same with other values for some flat names, checked as a whole."""
        groups: dict[str, dict[str, Any]] = {}
        for name, value in changes.items():
            groups.setdefault(OPTIONS[name].group, {})[OPTIONS[name].attribute] = value
        return replace(self, **{group: replace(getattr(self, group), **values) for group, values in groups.items()})

    def flat(self) -> dict[str, Any]:
        """Plain values by flat name, preset first, as trackers show them and flags give them."""
        values = {name: self.get(name) for name in (PRESET.name, *OPTIONS)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def grouped(self) -> dict[str, Any]:
        """Plain values by group, as YAML files have them."""
        return group_values(self.flat())


GROUPS: dict[str, type[Group]] = {
    name: kind for name, kind in get_type_hints(TrainConfig).items() if isinstance(kind, type) and issubclass(kind, Group)
}
OPTIONS: dict[str, Option] = {entry.name: entry for group, kind in GROUPS.items() for entry in options_of(kind, group)}
PRESET = Option("preset", "", "preset", str, "", {"text": "preset that the configuration was made from"})


def preset_names() -> list[str]:
    """The names of all presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def group_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by flat name as values by group."""
    grouped: dict[str, Any] = {}
    for name, value in values.items():
        entry = PRESET if name == PRESET.name else OPTIONS[name]
        (grouped.setdefault(entry.group, {}) if entry.group else grouped)[entry.attribute] = value
    return grouped


def flat_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by flat name, from values by group, by flat name, or some of both. Raises ValueError for unknown keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in GROUPS and isinstance(value, Mapping):
            names = {entry.attribute: name for name, entry in OPTIONS.items() if entry.group == key}
            for attribute, inner in value.items():
                refuse_unknown(f"configuration key in {key}", attribute, list(names))
                flat[names[attribute]] = inner
        else:
            refuse_unknown("configuration key", key, [PRESET.name, *OPTIONS, *(g for g in GROUPS if g not in OPTIONS)])
            if key not in (PRESET.name, *OPTIONS):
                refuse(key, value, f"its keys below it: {', '.join(e.attribute for e in OPTIONS.values() if e.group == key)}")
            flat[key] = value
    return flat


def _problem(error: Exception) -> str:
    """The error in a YAML file, with its line, or why the file cannot be read."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    return str(error).splitlines()[0]


def read_values(path: Path) -> dict[str, Any]:
    """The values of a YAML file by flat name. Raises ValueError for what is no configuration."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config is {str(path)!r}, which cannot be read: {_problem(error)}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"config is {str(path)!r}, which holds no configuration; expected groups such as data and network")
    return flat_values(values)


def preset_values(preset: str) -> dict[str, Any]:
    """A preset's values by flat name. Raises ValueError for an unknown one."""
    refuse_unknown("preset", preset, preset_names())
    return read_values(PRESETS / f"{preset}.yaml") | {"preset": preset}


def with_changes(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values with some changed, by flat name; another family or network drops those that only the old one uses."""
    values, changes = dict(values), flat_values(changes)
    old = values.get("family", "edm")
    family = changes.get("family", old)
    transformer = changes.get("transformer", family == old and values.get("transformer", False))
    if family in FAMILIES and (family, transformer) != (old, values.get("transformer", False)):
        values = used_values(values, OPTIONS, family, transformer)
    values |= changes
    if values.get("init_from"):
        from trainers.warm_start import started_values

        values = started_values(values, changes)
        values = used_values(values, OPTIONS, values["family"], values.get("transformer", False)) | changes
    if values.get("encoder") == "auto":  # settled here, so that a resumed run keeps it whatever is installed by then
        values["encoder"] = "efficientnet_lite0" if is_installed("efficientnet_lite0") else "pixels"
    return values


def load_config(preset: str, changes: Mapping[str, Any]) -> TrainConfig:
    """A preset's configuration with some values changed. Raises ValueError for unknown presets, keys or values."""
    return config_from(with_changes(preset_values(preset), changes))


def config_from(values: Mapping[str, Any]) -> TrainConfig:
    """A configuration from plain values, by group or flat name. Raises ValueError for unknown, missing or impossible ones."""
    flat = {name: OPTIONS[name].typed(value) if name in OPTIONS else value for name, value in flat_values(values).items()}
    if missing := [name for name, entry in OPTIONS.items() if is_required(entry) and name not in flat]:
        raise ValueError(f"{missing[0]} is not given; expected {OPTIONS[missing[0]].allowed()}")
    grouped = group_values(flat)
    return TrainConfig(
        **{name: kind(**grouped.get(name, {})) for name, kind in GROUPS.items()},  # type: ignore[arg-type]
        preset=flat.get("preset", ""),
    )

"""One run's configuration: a preset, changed by flags, checked as a whole before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from mlflow_icr import Protocol
from mlflow_icr.arguments import refuse_unknown
from mlflow_icr.extraction.encoders import is_installed
from mlflow_icr.tracking.checkpoints.folder import check_log_models

PRESETS = Path(__file__).parent / "presets"
MIXED_PRECISIONS = ("", "no", "bf16", "fp16")  # empty: as the launcher says, no without one
STOP_VERDICTS = ("", "turning", "memorizing")  # each later one is past the earlier
FAMILIES = ("edm", "ddpm", "flow")
PREDICTIONS = ("epsilon", "v")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # diffusers' names
# What only some families make use of: setting it for another one would change nothing, unnoticed.
READ_BY = {
    ("edm", "ddpm"): ("block_channels", "layers_per_block", "attention_resolutions"),
    ("flow",): ("hidden_size", "num_layers", "num_heads", "patch_size"),
    ("edm",): ("p_mean", "p_std", "sigma_data"),
    ("ddpm",): ("prediction", "beta_schedule"),
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes; refuses impossible values and combinations.

    Units are in the names: *_kimg are thousands of images seen. Raises ValueError naming field, value and what is allowed.
    """

    preset: str
    # Data: an embedded set, an image folder, or the name of a `datasets` set; the first num_images of a seeded order.
    data: str
    resolution: int
    num_images: int
    num_heldout: int
    total_kimg: float
    seed: int = 0
    data_split: str = "train"
    balanced: bool = False  # whether a subset has equally many images of each class, as far as there are
    # What is trained: edm, ddpm (with prediction epsilon or v) or flow; of classes or not; of pixels, or of the latents that
    # the AutoencoderKL in the folder `autoencoder` makes of them.
    family: str = "edm"
    prediction: str = "epsilon"
    beta_schedule: str = "linear"
    labels: bool = False
    label_dropout: float = 0.1  # how often a label is replaced by the null class, which the monitor reads
    autoencoder: str = ""
    # Network of edm and ddpm: diffusers' UNet2DModel; resolutions are those of the latents where there are any.
    block_channels: tuple[int, ...] = (32, 64)
    layers_per_block: int = 1
    attention_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0
    # Network of flow: diffusers' DiTTransformer2DModel.
    hidden_size: int = 384
    num_layers: int = 12
    num_heads: int = 6
    patch_size: int = 2
    # Optimization. batch_size counts all ranks and accumulated parts together.
    batch_size: int = 64
    learning_rate: float = 1e-3
    rampup_kimg: float = 2.0
    ema_halflife_kimg: float = 500.0
    ema_rampup_ratio: float = 0.05
    mixed_precision: str = ""
    gradient_accumulation_steps: int = 1
    # EDM (Karras et al. 2022, table 1).
    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float = 0.5
    # Measurements.
    measurements: int = 17
    first_measurement_kimg: float = 2.0
    layer: str = "decoder"
    sigmas: tuple[float, ...] = (0.29,)
    augmentation_level: int = 3
    probe_images: int = 128
    probe_views: int = 0  # 0 for as many as the layer's width needs
    projection: int = 0  # principal directions that are read, 0 for all dimensions
    shrinkage: str = "none"
    companions: tuple[str, ...] = ()
    measure_raw: bool = False
    stop_on: str = ""  # a verdict that ends the training: turning, memorizing, or empty for none
    generate_every: int = 2  # measurements from one judgement of samples to the next, counted from the last
    encoder: str = "pixels"  # auto: efficientnet_lite0 where its extra is installed, else pixels
    encoder_weights: str = ""
    num_samples: int = 128
    sample_steps: int = 18
    # Checkpoints. At most so many are kept on disk, 0 for all; those that may be the one to keep, and the newest, always are.
    checkpoints_total_limit: int = 0
    # Whose averaged weights MLflow gets: all, kept (at the end: the turning and the newest one), or none, and no models at all.
    # All: a checkpoint on disk has at least the same weights, and a measured one that nobody can sample from is half an answer.
    # Over a slow line, or for networks of gigabytes, kept is the choice: all are models with their metrics, two have weights.
    log_models: str = "all"

    def __post_init__(self) -> None:
        def refuse(name: str, allowed: str) -> None:
            raise ValueError(f"{name} is {getattr(self, name)!r}; expected {allowed}")

        for name, hint in get_type_hints(TrainConfig).items():
            value = getattr(self, name)
            if hint is float and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, name, float(value))
            elif str(hint).startswith("tuple") and isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for name in (
            "resolution",
            "num_images",
            "batch_size",
            "layers_per_block",
            "gradient_accumulation_steps",
            "num_samples",
            "generate_every",
            "hidden_size",
            "num_layers",
            "num_heads",
            "patch_size",
        ):
            if getattr(self, name) < 1:
                refuse(name, "a whole number >= 1")
        for name in ("total_kimg", "learning_rate", "ema_halflife_kimg", "p_std", "sigma_data", "first_measurement_kimg"):
            if not 0 < getattr(self, name) < math.inf:
                refuse(name, "a positive number")
        for name in ("num_heldout", "seed", "rampup_kimg", "checkpoints_total_limit"):
            if not 0 <= getattr(self, name) < math.inf:
                refuse(name, "a number >= 0")
        if not 0 <= self.dropout < 1:
            refuse("dropout", "a number in [0, 1)")
        if not 0 < self.ema_rampup_ratio < math.inf:
            refuse("ema_rampup_ratio", "a positive number")
        if self.mixed_precision not in MIXED_PRECISIONS:
            refuse("mixed_precision", f"one of {', '.join(MIXED_PRECISIONS[1:])}, or empty for the launcher's")
        if self.num_images < 2:
            refuse("num_images", "at least 2 images")
        self._check_family(refuse)
        if not self.autoencoder:
            self.check_network(self.resolution)
        if self.batch_size % self.gradient_accumulation_steps:
            refuse("batch_size", f"a multiple of gradient_accumulation_steps, {self.gradient_accumulation_steps}")
        if self.stop_on not in STOP_VERDICTS:
            refuse("stop_on", f"one of {', '.join(STOP_VERDICTS[1:])}, or empty")
        check_log_models(self.log_models)
        if self.measurements < 2:
            refuse("measurements", "at least 2")
        if self.first_measurement_kimg > self.total_kimg:
            refuse("first_measurement_kimg", f"at most total_kimg, {self.total_kimg:g}")
        if self.sample_steps < 2:
            refuse("sample_steps", "at least 2")
        try:
            self.protocol()
        except ValueError as error:
            ours = {"num_images": "probe_images", "num_views": "probe_views"}
            name, rest = str(error).split(" ", 1)
            raise ValueError(f"{ours.get(name, name)} {rest}") from None

    def _check_family(self, refuse: Callable[[str, str], None]) -> None:
        for name, allowed in (("family", FAMILIES), ("prediction", PREDICTIONS), ("beta_schedule", BETA_SCHEDULES)):
            if getattr(self, name) not in allowed:
                refuse(name, f"one of {', '.join(allowed)}")
        defaults = {field.name: field.default for field in fields(self)}
        for families, names in READ_BY.items():
            for name in names:
                if self.family not in families and getattr(self, name) != defaults[name]:
                    refuse(name, f"nothing for family {self.family}: it is of {' and '.join(families)}")
        if not 0 < self.label_dropout < 1:
            refuse("label_dropout", "a number in (0, 1): the monitor reads the null class, which stands for dropped labels")
        if not self.block_channels or any(c < 8 or c % 8 for c in self.block_channels):
            refuse("block_channels", "positive multiples of 8, one for each resolution")
        if self.hidden_size % (4 * self.num_heads):
            refuse("hidden_size", f"a multiple of {4 * self.num_heads}, four times num_heads")

    def check_ranks(self, ranks: int, parts: int | None = None) -> None:
        """Raise ValueError where the batch cannot be divided among ranks and accumulated parts (None: this configuration's)."""
        share = ranks * (parts or self.gradient_accumulation_steps)
        if self.batch_size % share:
            raise ValueError(
                f"batch_size is {self.batch_size}; expected a multiple of {share}, the ranks times gradient_accumulation_steps"
            )

    def check_network(self, side: int) -> None:
        """Raise ValueError where the network does not fit what it is trained on, images or latents of this side."""
        what = "" if side == self.resolution else f", which makes latents of side {side}"
        if self.family == "flow":
            if side % self.patch_size:
                raise ValueError(f"resolution is {self.resolution}{what}; expected a multiple of patch_size, {self.patch_size}")
            return
        blocks = len(self.block_channels)
        unit = 2 ** (blocks - 1)
        if side % unit:
            raise ValueError(f"resolution is {self.resolution}{what}; expected a multiple of {unit} for {blocks} blocks")
        levels = [side // 2**i for i in range(blocks)]
        if not set(self.attention_resolutions) <= set(levels):
            raise ValueError(
                f"attention_resolutions is {self.attention_resolutions!r}; expected some of {', '.join(map(str, levels))}, "
                "the resolutions of the blocks"
            )

    def protocol(self) -> Protocol:
        """What the monitor of this run measures."""
        return Protocol(
            layer=self.layer,
            sigmas=self.sigmas,
            augmentation_level=self.augmentation_level,
            num_images=min(self.probe_images, self.num_images) if self.probe_images >= 2 else self.probe_images,
            num_views=self.probe_views or None,
            projection=self.projection or None,
            shrinkage=self.shrinkage,
        )

    @property
    def total_images(self) -> int:
        """Images seen at the end, before rounding up to whole batches."""
        return round(self.total_kimg * 1000)

    def as_dict(self) -> dict[str, Any]:
        """Field names and plain values, as YAML and trackers take them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def preset_names() -> list[str]:
    """The presets there are."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(preset: str, changes: Mapping[str, Any]) -> TrainConfig:
    """A preset's configuration with some fields changed; with another family, without what only the preset's own reads.

    Raises ValueError for unknown presets, keys or values.
    """
    refuse_unknown("preset", preset, preset_names())
    values = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text()) | {"preset": preset}
    family = changes.get("family")
    if family in FAMILIES and family != values.get("family", "edm"):
        unread = {name for families, names in READ_BY.items() if family not in families for name in names}
        values = {key: value for key, value in values.items() if key not in unread}
    values |= dict(changes)
    if values.get("encoder") == "auto":  # settled here, so that a resumed run keeps it whatever is installed by then
        values["encoder"] = "efficientnet_lite0" if is_installed("efficientnet_lite0") else "pixels"
    return config_from(values)


def config_from(values: Mapping[str, Any]) -> TrainConfig:
    """A configuration from plain values, such as those of `config.yaml`. Raises ValueError for unknown or missing keys."""
    known = [field.name for field in fields(TrainConfig)]
    for key in values:
        refuse_unknown("configuration key", key, known)
    try:
        return TrainConfig(**values)
    except TypeError as error:
        raise ValueError(f"the configuration is not complete: {error}") from None

"""The trainings for the paper's figures, by scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.config import TrainConfig, config_from

EDM_FEW, EDM_MANY, FLOW_FEW, FLOW_MANY = "edm-few", "edm-many", "flow-few", "flow-many"
LATENT_FEW, DUPLICATES = "latent-few", "edm-duplicates"  # beyond the paper
REPEATED, TIMES = 8, 10  # number of images that are in the training set several times, and how often each is there


@dataclass(frozen=True)
class Training:
    """One run of `trainers.train`: its name, role, seed and flags; `images` are how many it is trained on."""

    name: str
    role: str
    seed: int
    images: int
    flags: Mapping[str, Any]

    def config(self, data: str, root: Path) -> TrainConfig:
        """The configuration of the run, in a study's folder. Raises ValueError where the flags are none."""
        flags = {**self.flags, "data": data, "num_images": self.images, "seed": self.seed}
        if self.role == LATENT_FEW:
            flags["autoencoder"] = str(autoencoder_folder(root))
        if self.role == DUPLICATES:
            flags |= {"data": str(duplicates_folder(root)), "num_heldout": 0}
        return config_from(flags)


def autoencoder_folder(root: Path) -> Path:
    """Where a study's autoencoder is."""
    return root / "autoencoder"


def duplicates_folder(root: Path) -> Path:
    """Where the images of a study's run with duplicates are."""
    return root / "duplicates"


@dataclass(frozen=True)
class AutoencoderPlan:
    """A diffusers AutoencoderKL: channels at each resolution, latent channels, and how it is trained, on the rich set."""

    channels: tuple[int, ...]
    latent_channels: int = 4
    layers: int = 1
    kimg: float = 32
    batch_size: int = 32
    learning_rate: float = 1e-3
    kl_weight: float = 1e-6  # of the posterior's divergence per pixel, as in latent diffusion


@dataclass(frozen=True)
class Scale:
    """The size of everything: images, lengths in thousands of images seen, networks, and the measurements of checkpoints.

    `common`, `edm` and `flow` are flags of `trainers.train`. `sigma` is the noise of trajectories, `sigma_flow` that of flow
    matching, t / (1 - t). `layers` are blocks around the monitored one, by their aliases.
    """

    name: str
    few: int
    many: int
    few_kimg: float
    many_kimg: float
    seeds: tuple[int, ...]
    common: Mapping[str, Any]
    edm: Mapping[str, Any]
    flow: Mapping[str, Any]
    probe: int = 256
    views: int = 16
    samples: int = 256
    sample_steps: int = 18
    sigma: float = 0.29
    sigma_flow: float = 0.25
    sigmas: tuple[float, ...] = (0.01, 0.02, 0.06, 0.14, 0.3, 0.59, 1.09, 1.92, 3.26)
    layers: tuple[str, ...] = ("mid", "decoder", "mid+2")
    subsets: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    labelled: int = 2000
    flow_few: int | None = None  # images of the transformer's runs on few; None: as `few`
    note: str = ""  # for the page: what was chosen after a first run, and why
    autoencoder: AutoencoderPlan = AutoencoderPlan((16, 32), kimg=24)
    latent: Mapping[str, Any] | None = None  # None: as `edm`

    def trainings(self) -> list[Training]:
        """Every run, those that most figures need first."""
        runs = []
        flow_few = self.few if self.flow_few is None else self.flow_few
        few = ((EDM_FEW, self.edm, self.few, self.few_kimg), (FLOW_FEW, self.flow, flow_few, self.few_kimg))
        rich = ((EDM_MANY, self.edm, self.many, self.many_kimg), (FLOW_MANY, self.flow, self.many, self.many_kimg))
        latent = (LATENT_FEW, self.edm if self.latent is None else self.latent, self.few, self.few_kimg)
        repeated = (DUPLICATES, self.edm, self.few + REPEATED * (TIMES - 1), self.few_kimg)
        first, *others = self.seeds
        order = [(kind, first) for kind in (few[0], *rich)] + [(few[0], seed) for seed in others]
        order += [(latent, first), (repeated, first)] + [(few[1], seed) for seed in self.seeds]
        for (role, flags, images, kimg), seed in order:
            runs.append(Training(f"{role}-seed{seed}", role, seed, images, {**self.common, **flags, "total_kimg": kimg}))
        return runs


# Figures are measured again, from checkpoints: the trainings themselves measure little.
QUIET = {"num_samples": 16, "generate_every": "1000000", "encoder": "pixels", "probe_images": 64, "log_models": "none"}
SMALL = Scale(
    name="small",
    note="A first run of the transformer on 64 images had copied nothing by its end; it has learned 32 since.",
    few=64,  # seen a thousand times
    many=16000,  # seen four times
    few_kimg=64,
    many_kimg=64,
    flow_few=32,  # of 64 the transformer had copied nothing by then
    seeds=(0, 1, 2),
    common={
        "resolution": 16, "num_heldout": 1200, "measurements": 10, "first_measurement_kimg": 2, "batch_size": 32,
        "learning_rate": 1e-3, "save_every_minutes": 0, **QUIET,
    },
    edm={"family": "edm", "block_channels": (16, 32, 64)},
    flow={"family": "flow", "labels": True, "hidden_size": 128, "num_layers": 4, "num_heads": 4, "patch_size": 4},
    views=8,
    samples=128,
    sample_steps=10,
    labelled=600,
    latent={"family": "edm", "block_channels": (32, 64)},
)  # fmt: skip
PAPER_EDM = {
    "family": "edm", "block_channels": (128, 256, 256, 256), "layers_per_block": 4, "attention_resolutions": (16,),
    "dropout": 0.13, "batch_size": 512, "learning_rate": 1e-3, "rampup_kimg": 10_000,
}  # fmt: skip
PAPER = Scale(
    name="paper",
    few=4096,
    many=48000,
    few_kimg=200_000,
    many_kimg=200_000,
    seeds=(0, 1, 2),
    common={
        "resolution": 32, "num_heldout": 2000, "measurements": 40, "first_measurement_kimg": 500, "log_models": "none",
        "num_samples": 64, "generate_every": "1000000", "encoder": "pixels", "probe_images": 512,
    },
    edm=PAPER_EDM,
    flow={
        "family": "flow", "labels": True, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "patch_size": 2,
        "batch_size": 256, "learning_rate": 1e-4,
    },
    probe=4096,
    views=2,
    samples=10_000,
    labelled=48000,
    autoencoder=AutoencoderPlan((128, 256), layers=2, kimg=10_000, batch_size=256, learning_rate=1e-4),
    latent={**PAPER_EDM, "block_channels": (128, 256, 256)},
)  # fmt: skip
SCALES = {scale.name: scale for scale in (SMALL, PAPER)}

"""The generation monitor: from a denoiser's samples to distances and copies."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from mlflow_icr.extraction.cache import ReferenceCache
from mlflow_icr.extraction.denoisers import Denoiser, device_of, encoder_of, evaluating
from mlflow_icr.extraction.encoders import Encoder, load_encoder
from mlflow_icr.extraction.files import cache_folder
from mlflow_icr.extraction.fitting import FittingBatches, host_batch
from mlflow_icr.extraction.samplers import sample, starting_noise
from mlflow_icr.extraction.views import as_unit_interval
from mlflow_icr.generation import Detection, Reference, memorization_ratio
from mlflow_icr.generation.neighbours import Search, k_nearest
from mlflow_icr.monitoring.generation_plots import distance_histogram
from mlflow_icr.monitoring.grid import image_grid
from mlflow_icr.monitoring.judgement import Judgement, copy_wall, judge
from mlflow_icr.monitoring.paths import POOLED_SIGMA, TRAJECTORIES, Path, PathReader, joined_path, sampled_path
from mlflow_icr.monitoring.ranks import gather_rows, sum_over_ranks, world
from mlflow_icr.monitoring.report import Report

RATIO_QUANTILES = (0.05, 0.25, 0.5)  # of distance ratios; a copy's is below 1/3
GRID_COLUMNS, GRID_ROWS = 16, 4


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, rounded, as they would be saved."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class GenerationMonitor:
    """Measures what a denoiser generates against its training images and, where there are any, held-out ones.

    `train` (N, C, H, W) and `heldout` (M, C, H, W) are uint8 or floats in [0, 1]. Sample i starts from the same noise at every
    step (keyed by seed and i), so that pictures can be compared. Samples are judged as uint8: copies by their pixels, and
    everything by the embeddings of `encoder`, by default pixels too. Under torch.distributed the ranks share sampling and
    encoding and get the same report; `batch_size` samples are made at a time, or as many as fit the memory. With `labels` (N,),
    sample i is of class labels[i modulo N], else of none. `search` finds neighbours, by default exactly. Embeddings of real
    images are read from `cache` if it has them. `pictures` False leaves pictures out of reports.
    Raises ValueError for sets that do not fit.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        train: Tensor,
        heldout: Tensor | None = None,
        *,
        encoder: Encoder | None = None,
        num_samples: int = 128,
        num_steps: int = 18,
        seed: int = 0,
        batch_size: int = 256,
        cache: ReferenceCache | None = None,
        labels: Tensor | None = None,
        search: Search = k_nearest,
        pictures: bool = True,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; expected at least 1")
        if len(train) < 2:
            raise ValueError(f"train has {len(train)} image(s); a second nearest neighbour needs at least 2")
        if heldout is not None and heldout.shape[1:] != train.shape[1:]:
            raise ValueError(f"heldout images are {tuple(heldout.shape[1:])}, training images {tuple(train.shape[1:])}")
        self.denoiser, self.labels, self.pictures = denoiser, labels, pictures
        self.shape = tuple(train.shape[1:])
        self.noise_shape = self._noise_shape(train[:1])
        self.images = train
        self.encoder = encoder or load_encoder("pixels", shape=self.shape)
        # In 8 bits if the images are, since there may be many; samples are judged in the same unit.
        self.pixels = (train if train.dtype == torch.uint8 else as_unit_interval(train)).flatten(1)
        self.heldout_images = None if heldout is None or len(heldout) < 2 else heldout
        self._references: tuple[Reference, Reference | None] | None = None
        self.cache = ReferenceCache(cache_folder()) if cache is None else cache
        self.search = search
        self.paths = PathReader(train, self.heldout_images, seed, num_steps)
        self.num_samples, self.num_steps, self.seed = num_samples, num_steps, seed
        x = torch.zeros(1, *self.noise_shape)
        self.batches = FittingBatches(host_batch(denoiser, x, batch_size))

    def _noise_shape(self, image: Tensor) -> tuple[int, ...]:
        """The shape of the noise that samples start from: that of images, or of their latents."""
        encode = encoder_of(self.denoiser)
        if encode is None:
            return self.shape
        return tuple(encode(as_unit_interval(image).to(device_of(self.denoiser)) * 2 - 1).shape[1:])

    def _starts(self, indices: list[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Noise (B, ...) and labels (B,) of the samples with these indices."""
        noise = starting_noise(indices, self.noise_shape, self.seed).to(device)
        return noise, None if self.labels is None else self.labels[torch.tensor(indices) % len(self.labels)].to(device)

    def _draw(self, indices: list[int], device: torch.device) -> Tensor:
        """The samples with these indices, (B, C, H, W), about in [-1, 1]."""
        noise, labels = self._starts(indices, device)
        return sample(self.denoiser, noise, num_steps=self.num_steps, labels=labels)

    def _draw_watched(self, indices: list[int], device: torch.device) -> tuple[Tensor, Path]:
        """The samples with these indices, and their path."""
        noise, labels = self._starts(indices, device)
        return sampled_path(self.denoiser, noise, self.num_steps, labels)

    def sample(self) -> Tensor:
        """The samples, (num_samples, C, H, W) uint8 on the CPU. Raises ValueError when one is not finite."""
        return self._samples(0)[0]

    def _samples(self, watched: int) -> tuple[Tensor, Path | None]:
        """The samples, and the path of the first `watched` ones, None for 0."""
        device = device_of(self.denoiser)
        rank, ranks = world()
        local_indices = list(range(rank, self.num_samples, ranks))
        local_watched = len(range(rank, watched, ranks))
        images = torch.empty(len(local_indices), *self.shape, dtype=torch.uint8, device=device)
        finite, done = torch.ones(len(local_indices), 1, dtype=torch.uint8, device=device), 0
        paths: list[Path] = []

        def keep(x: Tensor) -> None:
            nonlocal done
            finite[done : done + len(x)] = x.isfinite().flatten(1).all(1, keepdim=True)
            images[done : done + len(x)] = to_uint8(x.nan_to_num())
            done += len(x)

        with evaluating(self.denoiser.network):
            first, others = local_indices[:local_watched], local_indices[local_watched:]
            for x, path in self.batches.over(len(first), lambda rows: self._draw_watched(first[rows], device)):
                keep(x)
                paths.append(path)
            for x in self.batches.over(len(others), lambda rows: self._draw(others[rows], device)):
                keep(x)
        broken = int((gather_rows(finite, self.num_samples) == 0).sum())
        if broken:
            raise ValueError(f"{broken} of {self.num_samples} samples hold NaN or Inf")
        gathered = gather_rows(images, self.num_samples).cpu()
        return gathered, joined_path(paths, watched, device) if watched else None

    def _encode(self, images: Tensor) -> Tensor:
        """Embeddings (N, dim) of images that every rank has, each rank encoding its share."""
        rank, ranks = world()
        local_embeddings = self.encoder(images[rank::ranks]).to(device_of(self.denoiser))
        return gather_rows(local_embeddings, len(images)).cpu()

    def _reference(self, images: Tensor) -> Reference:
        """The reference of real images: read from the cache if every rank finds it, else made by all and kept by the first."""
        cached = self.cache.find(self.encoder, images)
        rank, ranks = world()
        if sum_over_ranks(int(cached is not None), device_of(self.denoiser)) == ranks and cached is not None:
            return cached
        reference = Reference(self._encode(images), self.search)
        if rank == 0:
            self.cache.keep(self.encoder, images, reference)
        return reference

    def _real(self) -> tuple[Reference, Reference | None]:
        """References of training and held-out images, made once."""
        if self._references is None:
            heldout = None if self.heldout_images is None else self._reference(self.heldout_images)
            self._references = self._reference(self.images), heldout
        return self._references

    def _read_paths(self, judgement: Judgement, scores: Tensor, path: Path | None) -> None:
        """Enter how far the network is from the optimal denoiser along its paths, and quantiles of the end points' ratios."""
        finite = scores[scores.isfinite()]
        for share in RATIO_QUANTILES:
            if len(finite):
                judgement.values[f"mem/ratio_l2_q{100 * share:02.0f}"] = float(finite.quantile(share))
        try:
            sigmas, distances = self.paths.read(self.denoiser, self.labels, path=path)
        except ValueError as error:
            judgement.absent["mem/path_distance"] = str(error)
            return
        for sigma, row in zip(sigmas, distances, strict=True):
            judgement.values[f"mem/path_distance_sigma{sigma:.2g}"] = float(row.median())
        pooled = [sigma <= POOLED_SIGMA for sigma in sigmas]
        if not any(pooled):
            judgement.absent["mem/path_distance"] = (
                f"no step of the sampler ends at sigma {POOLED_SIGMA:g} or less; expected more steps"
            )
            return
        per_trajectory = distances[pooled].mean(0)  # (T,)
        judgement.values["mem/path_distance"] = float(per_trajectory.median())
        judgement.values["mem/path_distance_q10"] = float(per_trajectory.quantile(0.1))
        judgement.distributions["mem/path_distances"] = per_trajectory.numpy()

    @property
    def _shares_trajectories(self) -> bool:
        """Whether the first samples are those that the look along the path would draw: by EDM's sampler, and enough of them."""
        by_edm, enough = getattr(self.denoiser, "sample", None) is None, self.num_samples >= TRAJECTORIES >= world()[1]
        return by_edm and enough and self.paths.why_not(self.denoiser) is None

    def _figures(self, images: Tensor, copies: Detection, judgement: Judgement) -> dict[str, np.ndarray]:
        """The first samples, the likeliest copies beside their images, and how far samples are from training images."""
        figures = {
            "samples": image_grid(images[: GRID_COLUMNS * GRID_ROWS], GRID_COLUMNS),
            "nearest": copy_wall(images, self.images, copies),
        }
        distances = [judgement.distributions.get(f"mem/distance_{self.encoder.name}{end}") for end in ("", "_train")]
        if distances[0] is not None and distances[1] is not None:
            figures["distances"] = distance_histogram(distances[0], distances[1], self.encoder.name)
        return figures

    def measure(self, step: int) -> Report:
        """The report at `step` images seen: `mem/*`, `gen/*`, pictures of the first samples and of the likeliest copies."""
        started = time.perf_counter()
        keys = ("mem/ratio_l2", f"gen/fd_{self.encoder.name}")
        try:
            images, path = self._samples(TRAJECTORIES if self._shares_trajectories else 0)
        except ValueError as error:  # training has diverged, but may continue
            return Report(step, {}, absent=dict.fromkeys(keys, str(error)))
        train, heldout = self._real()
        judgement = judge(self._encode(images), train, heldout, self.encoder.name, search=self.search)
        judged = images if self.pixels.dtype == torch.uint8 else as_unit_interval(images)
        copies = memorization_ratio(judged.flatten(1), self.pixels, search=self.search)
        judgement.detection("mem/ratio_l2", copies)
        self._read_paths(judgement, copies.scores, path)
        if self.encoder.name == "pixels":  # it would be the same number again
            for end in ("", "_low", "_high"):
                judgement.values.pop(f"mem/ratio_pixels{end}")
        figures = self._figures(images, copies, judgement) if self.pictures else {}
        judgement.values["perf/generate_seconds"] = time.perf_counter() - started
        return Report(
            step,
            judgement.values,
            figures,
            judgement.absent,
            warnings=judgement.warnings,
            distributions=judgement.distributions,
        )

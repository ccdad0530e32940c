"""Denoising errors of the probe images, of views of them and of held-out images, on the same noise at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from mlflow_icr.extraction.denoisers import Denoiser, device_of, encoder_of, evaluating
from mlflow_icr.extraction.error_views import AUGMENTATIONS, DIRECTIONS, far_views, near_views
from mlflow_icr.extraction.fitting import FittingBatches
from mlflow_icr.extraction.keyed import keyed_generator
from mlflow_icr.extraction.views import as_unit_interval
from mlflow_icr.generation import optimal_denoiser
from mlflow_icr.monitoring.protocol import Protocol
from mlflow_icr.monitoring.ranks import gather_rows, world
from mlflow_icr.representation import Estimate, view_error_ratio

# Whole forward passes cost more than those that end at the layer. This many errors give the ratio a standard error of a few
# per cent; a turn multiplies the ratio.
ERROR_IMAGES = 256
LEVEL_IMAGES = 64  # errors at each of the noise levels around the monitored one, which no verdict reads
LEVELS = (0.5, 2.0, 4.0)  # noise levels around the monitored one, as factors: copies may begin at another level
JUDGED_SIDE = 32
ROUNDING = 1e-12  # squared error of values in [-1, 1]: smaller where each image is denoised to its exact copy
ALLOWED_BIAS = 0.05
CACHE_BYTES = 32 * 2**20  # of views; latents are always kept, because encoding is expensive


@dataclass(frozen=True, eq=False)
class Errors:
    """Mean squared errors at one noise level, each (N,) float64 on the CPU, from all ranks.

    `image` has the errors of images, `near` and `far` those of their views on the same noise (None where training makes such
    views itself), `near_way` and `far_way` the views' mean squared distances from the images, `heldout` (M,) the errors of
    held-out images (None without any). `single` has one error each of image, near and far view, and `other` one of each image
    on another noise; they are compared as single draws.
    """

    image: Tensor
    near: Tensor | None
    far: Tensor | None
    near_way: Tensor | None
    far_way: Tensor | None
    single: Mapping[str, Tensor]
    other: Tensor
    heldout: Tensor | None = None


def _share(count: int) -> list[int]:
    rank, ranks = world()
    return list(range(rank, count, ranks))


class ErrorReader:
    """Mean squared errors of denoising `images` (N, C, H, W), their views, and held-out images; `protocol` is resolved.

    The first 256 images are used; fewer images get several noises each, so that about 256 errors are averaged. An image and its
    views get the same noise. A denoiser of latents has errors of latents: images and views are encoded once and kept.
    """

    def __init__(self, images: Tensor, protocol: Protocol, batch_size: int, heldout: Tensor | None = None) -> None:
        self.all_images, self.images = images, images[:ERROR_IMAGES]
        self.protocol, self.batches = protocol, FittingBatches(batch_size)
        self.heldout = None if heldout is None or len(heldout) < 2 else heldout[:ERROR_IMAGES]
        self._kept: dict[tuple[str, int, int, int], Tensor] = {}  # by set, first image, number of images and draws of a batch

    @property
    def columns(self) -> tuple[str, ...]:
        """The inputs denoised for each image: itself, two near views, a far one, and itself again on another noise.

        Views that training makes itself are left out.
        """
        trained = self.protocol.training_augmentations
        near = () if "shift" in trained else ("near", "near")
        return ("image", *near, *(() if set(trained) >= set(AUGMENTATIONS) else ("far",)), "other")

    @cached_property
    def far_bias(self) -> Estimate | None:
        """The ratio of far views for a denoiser that does not know the image: the optimal one of all other images.

        None without far views, and where each image has an exact copy among the others. Larger images are averaged down to at
        most 32 pixels a side.
        """
        if "far" not in self.columns:
            return None
        factor = max(1, -(-max(self.all_images.shape[-2:]) // JUDGED_SIDE))
        small = torch.cat([avg_pool2d(as_unit_interval(part), factor) for part in self.all_images.split(64)]) * 2 - 1
        own = small[: len(self.images)]
        ways = torch.arange(len(own))
        sigma, places = self.protocol.sigmas[0], ways.tolist()
        noise = sigma * self._noise("far-bias", places, own.shape[1:], torch.device("cpu"))

        def errors(clean: Tensor) -> Tensor:
            denoised = optimal_denoiser((clean + noise).flatten(1), sigma, small.flatten(1), leave_out=ways)
            return (denoised - clean.flatten(1).double()).square().mean(1)

        of_images = errors(own)
        if float(of_images.mean()) < ROUNDING:
            return None
        return view_error_ratio(of_images, errors(far_views(own, ways, self.protocol.training_augmentations)))

    @cached_property
    def chosen(self) -> str:
        """The views that best show memorized images: far ones where they are no harder by themselves, else near ones.

        Far views of photographs are no harder; those of images that are aligned, such as digits, are several times harder.
        """
        if "near" not in self.columns:
            return "far"
        bias = self.far_bias
        return "far" if bias is not None and bias.low <= 1 + ALLOWED_BIAS and bias.high >= 1 - ALLOWED_BIAS else "near"

    def _pixels(self, images: Tensor, indices: list[int], draws: int) -> Tensor:
        """Images and views in [-1, 1], (B, J, columns, C, H, W), whose draws are keyed by the images' places."""
        clean = (as_unit_interval(images) * 2 - 1)[:, None].expand(-1, draws, -1, -1, -1)
        flat = clean.flatten(0, 1)
        parts = [flat[:, None]]
        streams = [keyed_generator("error-view", self.protocol.seed, i) for i in indices]
        # Directions rotate from draw to draw, starting at a random one for each image.
        start = torch.from_numpy(np.stack([s.integers(2 * len(DIRECTIONS), size=1) for s in streams]))
        ways = (start + torch.arange(draws)).flatten()
        if "near" in self.columns:
            parts.append(near_views(flat, ways % 2))
        if "far" in self.columns:
            parts.append(far_views(flat, ways, self.protocol.training_augmentations)[:, None])
        parts.append(flat[:, None])
        return torch.cat(parts, 1).unflatten(0, clean.shape[:2])

    def _clean(self, name: str, indices: list[int], draws: int, denoiser: Denoiser) -> Tensor:
        """The inputs to denoise, without noise, on the denoiser's device: (B, J, columns, C, H, W)."""
        key = (name, indices[0], len(indices), draws)
        if key in self._kept:
            return self._kept[key]
        device, encode = device_of(denoiser), encoder_of(denoiser)
        if name == "heldout":
            assert self.heldout is not None
            x = (as_unit_interval(self.heldout[indices]) * 2 - 1)[:, None, None].expand(-1, draws, 1, -1, -1, -1)
        else:
            x = self._pixels(self.images[indices], indices, draws)
        x = x.to(device)
        if encode is not None:
            flat = x.flatten(0, 2)
            encoded = self.batches.over(len(flat), lambda rows: encode(flat[rows]))
            x = torch.cat(list(encoded)).unflatten(0, x.shape[:3])
        size = x.numel() * x.element_size()
        if encode is not None or size + sum(k.numel() * k.element_size() for k in self._kept.values()) <= CACHE_BYTES:
            self._kept[key] = x
        return x

    def _noise(self, name: str, indices: list[int], shape: Sequence[int], device: torch.device) -> Tensor:
        """Unit noise (B, *shape)."""
        streams = [keyed_generator(name, self.protocol.seed, i) for i in indices]
        return torch.from_numpy(np.stack([s.standard_normal(tuple(shape), dtype=np.float32) for s in streams])).to(device)

    @torch.no_grad()
    def _errors(
        self, name: str, denoiser: Denoiser, sigma: float, num_errors: int, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Errors (N, columns) of a set's first images, squared distances of views from images, and one error each.

        All ranks are gathered. About `num_errors` errors of images are averaged; fewer images get several noises each.
        """
        images = self.images if name == "error" else self.heldout
        assert images is not None
        count = min(len(images), num_errors)
        device, local_indices = device_of(denoiser), _share(count)
        draws = -(-num_errors // count) if name == "error" else 1

        def rows_of(rows: slice) -> Tensor:
            """Errors, ways and single errors (B, 3, columns) of these rows of this rank's images."""
            batch_indices = local_indices[rows]
            x = self._clean(name, batch_indices, draws, denoiser)
            noise = self._noise(name, batch_indices, (draws, 2, *x.shape[3:]), device)
            # All columns have the first noise, the last of several has the second.
            noise = torch.cat([noise[:, :, :1].expand(-1, -1, x.shape[2] - 1, *[-1] * (x.ndim - 3)), noise[:, :, -1:]], 2)
            noisy = (x + sigma * noise).flatten(0, 2)
            class_labels = None if labels is None else labels[batch_indices].to(device).repeat_interleave(draws * x.shape[2])

            def denoise(part: slice) -> Tensor:
                condition = {} if class_labels is None else {"labels": class_labels[part]}
                return denoiser(noisy[part], sigma, **condition)

            # One image may have more views than a batch holds.
            denoised = torch.cat(list(self.batches.over(len(noisy), denoise))).view_as(x)
            errors, ways = ((y - z).square().flatten(3).mean(3) for y, z in ((denoised, x), (x, x[:, :, :1])))
            return torch.stack([errors.mean(1), ways.mean(1), errors[:, 0]], 1)

        parts = list(self.batches.over(len(local_indices), rows_of, each=draws * len(self.columns)))
        columns = len(self.columns) if name == "error" else 1
        rows = torch.cat(parts) if parts else torch.empty(0, 3, columns, device=device)
        errors, ways, single = gather_rows(rows, count).cpu().double().unbind(1)
        return errors, ways, single

    def read(self, denoiser: Denoiser, sigma: float, *, monitored: bool = True, labels: Tensor | None = None) -> Errors:
        """The errors at noise sigma, of 64 images where it is not the `monitored` level.

        With `labels` (N,) a class-conditional network gets each image's own; held-out images are not denoised then.
        """
        num_errors = ERROR_IMAGES if monitored else min(ERROR_IMAGES, LEVEL_IMAGES)
        with evaluating(denoiser.network):
            errors, ways, single = self._errors("error", denoiser, sigma, num_errors, labels)
            heldout = None
            if self.heldout is not None and labels is None:
                heldout = self._errors("heldout", denoiser, sigma, num_errors)[0][:, 0]

        def mean_of(kind: str, table: Tensor) -> Tensor | None:
            places = [place for place, column in enumerate(self.columns) if column == kind]
            return table[:, places].mean(1) if places else None

        single_errors = {column: single[:, self.columns.index(column)] for column in self.columns}
        return Errors(
            errors[:, 0],
            mean_of("near", errors),
            mean_of("far", errors),
            mean_of("near", ways),
            mean_of("far", ways),
            single_errors,
            single_errors["other"],
            heldout,
        )

    @torch.no_grad()
    def sima(self, denoiser: Denoiser, sigma: float) -> float:
        """The mean over images of |x - D(x; sigma)| / sigma at images x without noise, the root mean square over pixels.

        Source: SimA, arXiv 2509.25003.
        """
        device, local_indices, encode = device_of(denoiser), _share(len(self.images)), encoder_of(denoiser)

        def lengths(rows: slice) -> Tensor:
            x = as_unit_interval(self.images[local_indices[rows]]).to(device) * 2 - 1
            x = x if encode is None else encode(x)
            return (x - denoiser(x, sigma)).square().flatten(1).mean(1).sqrt() / sigma

        with evaluating(denoiser.network):
            parts = list(self.batches.over(len(local_indices), lengths))
        rows = torch.cat(parts) if parts else torch.empty(0, device=device)
        return float(gather_rows(rows, len(self.images)).cpu().double().mean())

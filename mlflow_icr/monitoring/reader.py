"""The reader: features of a denoiser's layer on the protocol's views; each rank reads its share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mlflow_icr.extraction.denoisers import Denoiser, device_of, encoder_of, null_class_of
from mlflow_icr.extraction.fitting import FittingBatches, host_batch
from mlflow_icr.extraction.taps import Tap
from mlflow_icr.extraction.views import check_images, make_views
from mlflow_icr.monitoring.protocol import Protocol
from mlflow_icr.monitoring.ranks import sum_over_ranks, world


def view_batches(
    images: Tensor,
    indices: Sequence[int],
    num_views: int,
    sigma: float,
    protocol: Protocol,
    batches: FittingBatches,
    device: torch.device,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Views (B, K, C, H, W) of the images at these indices, in batches.

    With `encode` they are views of latents, as in `make_views`.
    """

    def views(rows: slice) -> Tensor:
        batch_indices = list(indices[rows])
        return make_views(
            images[batch_indices],
            batch_indices,
            num_views=num_views,
            sigma=sigma,
            seed=protocol.seed,
            level=protocol.augmentation_level,
            device=device,
            encode=encode,
        )

    yield from batches.over(len(indices), views, each=num_views)


def dtype_of(denoiser: Denoiser) -> str:
    """The name of the network's floating-point type, such as float32."""
    return str(next((p.dtype for p in denoiser.network.parameters()), torch.float32)).removeprefix("torch.")


def condition_of(denoiser: Denoiser) -> str:
    """What a network is conditioned on besides noise: `null class` for a class-conditional network, else empty."""
    return "" if null_class_of(denoiser) is None else "null class"


class FeatureReader:
    """Reads (N, K, D) features of a fixed set of views; views are made once and kept while they fit into `cache_bytes`.

    For a denoiser of latents, views are encoded once, and the latents are kept. `images` (N, C, H, W) are those that
    `protocol` resolves to. Image i belongs to rank i modulo the number of ranks.
    """

    def __init__(self, denoiser: Denoiser, images: Tensor, protocol: Protocol, batch_size: int, cache_bytes: int) -> None:
        self.batches = FittingBatches(batch_size)
        check_images(images)  # images that cannot be augmented are refused now, not at the first measurement
        self.cache_bytes = cache_bytes
        self._encode = encoder_of(denoiser)
        self.dim, self._view_bytes = self._width(denoiser, images[:1], protocol)
        resolved = protocol.resolve(images=len(images), dim=self.dim)
        self.protocol = replace(resolved, dtype=dtype_of(denoiser), condition=condition_of(denoiser))
        self.images = images[: self.protocol.num_images]
        self._cache: dict[float, list[Tensor]] = {}

    def _width(self, denoiser: Denoiser, image: Tensor, protocol: Protocol) -> tuple[int, int]:
        """D of the tapped layer and the bytes of a view, from one image."""
        sigma = protocol.sigmas[0]
        view = make_views(image, [0], num_views=1, sigma=sigma, seed=0, device=device_of(denoiser), encode=self._encode)[0]
        self.batches.size = host_batch(denoiser, view, self.batches.size)
        with Tap(denoiser.network, protocol.layer) as tap:
            return int(tap(lambda: denoiser(view, sigma)).shape[1]), 4 * view.numel()

    @property
    def num_views(self) -> int:
        """K."""
        assert self.protocol.num_views is not None
        return self.protocol.num_views

    def views(self, sigma: float, device: torch.device) -> Iterator[Tensor]:
        """This rank's views in batches (B, K, C, H, W), the same at every call."""
        if sigma in self._cache:
            yield from self._cache[sigma]
            return
        rank, ranks = world()
        p, k = self.protocol, self.num_views
        local_indices = list(range(rank, len(self.images), ranks))
        to_cache: list[Tensor] | None = []
        total = k * self._view_bytes * len(local_indices) * len(p.sigmas)
        if total > self.cache_bytes:
            to_cache = None
        for views in view_batches(self.images, local_indices, k, sigma, p, self.batches, device, self._encode):
            if to_cache is not None:
                to_cache.append(views)
            yield views
        if to_cache is not None:
            self._cache[sigma] = to_cache

    def read(self, denoiser: Denoiser, sigma: float, labels: Tensor | None = None) -> Tensor:
        """Features of this rank's images, (N of this rank, K, D), in the network's dtype, on its device.

        With `labels` (N,), those of all images, a class-conditional network gets each image's own. Raises ValueError,
        on all ranks, when features of any rank are not finite.
        """
        parts: list[Tensor] = []
        device, (rank, ranks) = device_of(denoiser), world()
        local_labels = None if labels is None else labels[rank::ranks].to(device)
        done = 0
        with Tap(denoiser.network, self.protocol.layer) as tap:
            for views in self.views(sigma, device):
                # One image may have more views than a batch holds.
                flat = views.flatten(0, 1)
                classes = (
                    None if local_labels is None else local_labels[done : done + len(views)].repeat_interleave(self.num_views)
                )
                done += len(views)

                def pooled(rows: slice, flat: Tensor = flat, classes: Tensor | None = classes) -> Tensor:
                    condition = {} if classes is None else {"labels": classes[rows]}
                    return tap(partial(denoiser, flat[rows], sigma, **condition))

                pieces = list(self.batches.over(len(flat), pooled))
                parts.append(torch.cat(pieces).view(len(views), self.num_views, -1))
        features = torch.cat(parts) if parts else torch.empty(0, self.num_views, self.dim, device=device)
        # All ranks check together: if one raised alone, the others would wait for its moments for ever.
        broken = sum_over_ranks(int((~features.isfinite().flatten(1).all(1)).sum()), device)
        if broken:
            raise ValueError(f"features hold NaN or Inf in {broken} of {len(self.images)} images")
        return features

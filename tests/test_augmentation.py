"""What training images become before they are noised, and that samples do not show it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mlflow_icr.extraction.latents import encode_images, load_autoencoder
from tests.family_runs import configured, tiny_autoencoder
from trainers.batches import Order, draw_batch
from trainers.config import load_config
from trainers.families import family_of
from trainers.inputs import Inputs, inputs_of


def test_half_of_a_batch_is_mirrored_by_keys_whatever_the_share_of_a_rank(digits: Tensor) -> None:
    config = load_config("digits", {"num_images": 64, "batch_size": 64, "augment": "flip"})
    family, inputs, order = family_of(config), Inputs(digits[:64]), Order(64, 0)
    whole = draw_batch(inputs, order, family, 640)
    plain = draw_batch(inputs, order, family_of(load_config("digits", {"num_images": 64, "batch_size": 64})), 640)
    assert whole.mirrored is not None
    assert plain.mirrored is None
    assert torch.equal(whole.noise, plain.noise)
    as_they_are = plain.clean(inputs)
    expected = [image.flip(-1) if flip else image for image, flip in zip(as_they_are, whole.mirrored, strict=True)]
    assert torch.equal(whole.clean(inputs), torch.stack(expected))
    rows = np.arange(5, 20)
    part = draw_batch(inputs, order, family, 640, rows)
    assert torch.equal(part.clean(inputs), whole.clean(inputs)[5:20])
    shares = [draw_batch(inputs, order, family, 64 * i).mirrored for i in range(100)]
    share = float(torch.stack([s for s in shares if s is not None]).float().mean())
    assert abs(share - 0.5) < 4 * 0.5 / 80  # four standard errors of 6400 draws


def test_mirror_images_of_a_latent_model_are_encoded_not_mirrored(digits: Tensor, tmp_path: object) -> None:
    folder = f"{tmp_path}/vae"
    tiny_autoencoder().save_pretrained(folder)
    config = configured("flow", augment="flip", autoencoder=folder)
    from trainers.data import DataSet

    data = DataSet(digits[:32], digits[32:40], "", "")
    autoencoder = load_autoencoder(folder)
    inputs = inputs_of(config, data, autoencoder, torch.device("cpu"))
    assert inputs.mirrored is not None
    assert torch.allclose(inputs.mirrored, encode_images(autoencoder, digits[:32].flip(-1), torch.device("cpu")), atol=1e-5)
    assert not torch.allclose(inputs.mirrored, inputs.images.flip(-1), atol=1e-2)
    batch = draw_batch(inputs, Order(32, 0), family_of(config), 0)
    assert batch.mirrored is not None
    assert batch.spread is not None
    where = inputs.mirrored[batch.indices], inputs.images[batch.indices]
    mean, deviation = torch.where(batch.mirrored.view(-1, 1, 1, 1), *where).chunk(2, 1)
    assert torch.equal(batch.clean(inputs), mean + deviation * batch.spread)

"""What training images become before they are noised, and that samples do not show it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from mlflow_icr.extraction.latents import encode_images, load_autoencoder
from mlflow_icr.extraction.pipelines import load_denoiser
from mlflow_icr.extraction.samplers import sample
from tests.family_runs import configured, started, tiny_autoencoder, weights
from trainers.augment_labels import add_label_layer
from trainers.augmentation import Warps, augment, draw_augmented, draw_warps
from trainers.batches import Order, draw_batch
from trainers.checkpoint import load_checkpoint, save_checkpoint, state_tensors
from trainers.config import load_config
from trainers.families import family_of
from trainers.inputs import Inputs, inputs_of
from trainers.loop import new_state, train


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


def shown(warps: Warps, x: Tensor) -> Tensor:
    """Images (B, C, H, W) as Karras et al.'s table 6 has them, by kornia: enlarged, turned, stretched, then shifted."""
    from kornia.geometry.transform import warp_affine

    height, width = x.shape[-2:]

    def matrix(*rows: tuple[float, float, float]) -> np.ndarray:
        return np.array([*rows, (0, 0, 1)], dtype=float)

    def turn(angle: float) -> np.ndarray:
        cos, sin = np.cos(angle), np.sin(angle)
        return matrix((cos, -sin, 0), (sin, cos, 0))

    matrices = []
    for i in range(len(x)):
        centre = (width - 1) / 2, (height - 1) / 2
        s, a = 2 ** (0.2 * warps.scale[i]), 2 ** (0.2 * warps.stretch[i])
        steps = [
            matrix((1, 0, -centre[0]), (0, 1, -centre[1])),
            matrix((s, 0, 0), (0, s, 0)),
            turn(warps.turn[i]),
            turn(-warps.axis[i]),
            matrix((a, 0, 0), (0, 1 / a, 0)),
            turn(warps.axis[i]),
            matrix((1, 0, warps.right[i] * width / 8), (0, 1, warps.down[i] * height / 8)),
            matrix((1, 0, centre[0]), (0, 1, centre[1])),
        ]
        whole = np.eye(3)
        for step in steps:
            whole = step @ whole
        matrices.append(whole[:2])
    moved = torch.from_numpy(np.stack(matrices)).float()
    # kornia's coordinates are those of pixels' centres with align_corners.
    return warp_affine(x, moved, (height, width), mode="bicubic", padding_mode="zeros", align_corners=True)


def test_edms_pipe_is_that_of_its_table(rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.random((64, 2, 24, 32), dtype=np.float32))
    warps, how = (draw(np.random.default_rng(7), 64, 0.6) for draw in (draw_warps, partial(draw_augmented, size=(24, 32))))
    flipped = torch.where(how.mirrored[:, 0, None, None, None], x.flip(-1), x)
    flipped = torch.where(how.mirrored[:, 1, None, None, None], flipped.flip(-2), flipped)
    assert 20 < int(how.mirrored[:, 0].sum()) < 44
    assert 8 < int(how.mirrored[:, 1].sum()) < 32
    found = augment(x, how)
    inside = (shown(warps, torch.ones_like(x)) - 1).abs() < 1e-5  # all that is read is in the image; beyond it the two differ
    assert inside.float().mean() > 0.5
    # Places of 24 pixels in float32, times slopes of at most 2 or so a pixel.
    torch.testing.assert_close(found[inside], shown(warps, flipped)[inside], atol=1e-4, rtol=0)
    assert torch.equal(found[~how.warped], flipped[~how.warped])
    assert 0 < int((~how.warped).sum()) < 16
    labels = warps.labels()
    assert labels.shape == (64, 9)
    assert not labels[~how.warped][:, 2:].any()
    turned = torch.from_numpy(warps.turn).float()
    torch.testing.assert_close(labels[:, 3:5], torch.stack([turned.cos() - 1, turned.sin()], 1))
    torch.testing.assert_close(labels[:, 5:7].norm(dim=1), torch.from_numpy(warps.stretch).float().abs())


def test_edms_pipe_is_drawn_by_keys_and_often_as_the_paper_says(digits: Tensor) -> None:
    config = load_config("digits", {"num_images": 64, "batch_size": 64, "augment": "edm"})
    family, inputs, order = family_of(config), Inputs(digits[:64]), Order(64, 0)
    entire = draw_batch(inputs, order, family, 640)
    share = draw_batch(inputs, order, family, 640, np.arange(5, 20))
    assert entire.augmented is not None
    assert share.augmented is not None
    assert torch.equal(share.augmented.labels, entire.augmented.labels[5:20])
    # Each row is moved by itself, but for the rounding of another batch's products.
    torch.testing.assert_close(share.clean(inputs), entire.clean(inputs)[5:20], atol=1e-5, rtol=0)
    halves = [entire.part(i, 2).clean(inputs) for i in range(2)]
    torch.testing.assert_close(torch.cat(halves), entire.clean(inputs), atol=1e-5, rtol=0)
    told = torch.cat([a.labels for i in range(100) if (a := draw_batch(inputs, order, family, 64 * i).augmented) is not None])
    shares = (told != 0).double().mean(0)
    for place, expected in ((0, 0.5), (1, 0.06), (2, 0.12), (3, 0.12), (5, 0.12), (7, 0.12), (8, 0.12)):
        assert abs(float(shares[place]) - expected) < 4 * (expected * (1 - expected) / 6400) ** 0.5, place
    assert config.protocol().training_augmentations == ("flip",)
    with pytest.raises(ValueError, match="augment is 'edm'; expected flip or nothing with autoencoder"):
        load_config("digits", {"augment": "edm", "autoencoder": "somewhere"})


@pytest.mark.parametrize("name", ["edm-labels", "flow"])
def test_the_network_is_told_in_training_alone_and_is_saved_without(name: str, digits: Tensor, tmp_path: Path) -> None:
    family, state, accelerator = started(configured(name, augment="edm", augment_probability=0.5, power_ema_stds=(0.1,)))
    labels = torch.arange(64) % 10 if "labels" in name else None
    inputs = Inputs(digits[:64], labels)
    for _ in zip(range(3), train(state, inputs, family, accelerator), strict=False):
        pass
    layer = {key: value for key, value in state.ema.state_dict().items() if key.endswith("cond_proj.weight")}
    assert all(value.abs().sum() > 0 for value in layer.values())
    folder = save_checkpoint(tmp_path, state, family, accelerator, state_tensors(state, accelerator, {}))
    x, sigma = torch.randn(2, 1, 8, 8, generator=torch.manual_seed(0)), torch.tensor([0.3, 2.0])
    denoiser, _ = load_denoiser(folder, trust_remote_code=True)
    with torch.no_grad():
        plain = family.denoiser(state.ema)(x, sigma)
        torch.testing.assert_close(denoiser(x, sigma), plain, atol=1e-5, rtol=1e-5)
        state.network.eval()
        told = family.denoiser(state.network)
        silent = told(x, sigma)
        state.network.train()
        state.augment_labels.of_rows = torch.zeros(2, 9)
        assert torch.equal(told(x, sigma), silent)
        state.augment_labels.of_rows = torch.ones(2, 9)
        assert not torch.equal(told(x, sigma), silent)
    again = started(family.config)[1]
    load_checkpoint(folder, again, accelerator)
    assert again.images_seen == 96
    for (key, value), other in zip(state.network.state_dict().items(), again.network.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    next(train(again, inputs, family, accelerator))
    next(train(state, inputs, family, accelerator))
    assert torch.equal(weights(again.network), weights(state.network))


class Perceptron(nn.Module):
    """A network that learns in seconds where in an image something is; its embedding of time is a U-Net's."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.time_proj, self.time_embedding = Timesteps(32, True, 0), TimestepEmbedding(32, width)
        self.first, self.second, self.last = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 64)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        embedding = self.time_embedding(self.time_proj(time))
        hidden = nn.functional.silu(self.first(x.flatten(1)) + embedding)
        hidden = hidden + nn.functional.silu(self.second(hidden) + embedding)
        return self.last(hidden).view_as(x)


def sampled(told: bool) -> Tensor:
    """Samples (200, 8, 8) of a network trained on images that are brighter to the right; `told` of augmentations or not."""
    config = load_config(
        "digits",
        {"augment": "edm", "augment_probability": 0.2, "batch_size": 64, "rampup_kimg": 0, "learning_rate": 3e-3}
        | {"ema_halflife_kimg": 2.0, "sigma_data": 0.5},
    )
    family, accelerator = family_of(config), Accelerator(cpu=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Perceptron()
    add_label_layer(network)
    state = new_state(network, config, accelerator)
    network.time_embedding.cond_proj.requires_grad_(told)  # of zeros, and stays so
    brightness = torch.empty(64, 1, 1, 1).uniform_(0.8, 1, generator=torch.manual_seed(0))
    images = (brightness * torch.linspace(0, 255, 8)).expand(-1, 1, 8, 8).round().to(torch.uint8)
    for _ in zip(range(300), train(state, Inputs(images), family, accelerator), strict=False):
        pass
    noise = torch.randn(200, 1, 8, 8, generator=torch.manual_seed(1))
    with torch.no_grad():
        return sample(family.denoiser(state.ema), noise, num_steps=10)[:, 0]


def test_samples_are_not_augmented_where_the_network_is_told() -> None:
    """Half of what is trained on is darker to the right: so are samples where nobody says so, and hardly any where it is."""
    shares = [
        float((found[:, :, 4:].mean((1, 2)) < found[:, :, :4].mean((1, 2))).float().mean())
        for found in map(sampled, (True, False))
    ]
    assert shares[0] < 0.15
    assert shares[1] > 0.4

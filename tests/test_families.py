"""Model families: closed forms, training on real images, classes, and folders that plain diffusers samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from mlflow_icr import ICRMonitor, LossMonitor, SchedulerDenoiser
from mlflow_icr.extraction.flow import FlowDenoiser
from mlflow_icr.extraction.latents import Autoencoder, LatentDenoiser
from mlflow_icr.extraction.pipelines import load_denoiser
from mlflow_icr.extraction.samplers import heun_sample, sample
from tests.family_runs import FAMILIES, configured, sampled_by_diffusers, started, tiny_autoencoder
from trainers.batches import Order, draw_batch
from trainers.checkpoint import place_autoencoder
from trainers.data import load_data
from trainers.families import family_of
from trainers.inputs import Inputs
from trainers.loop import train


@pytest.fixture(scope="module")
def digits_inputs() -> Inputs:
    data = load_data("digits", resolution=8, num_images=64, num_heldout=0, seed=0)
    return Inputs(data.train, data.train_labels)


def test_a_transformer_without_classes_is_not_told_those_of_labelled_images(digits_inputs: Inputs) -> None:
    config = configured("flow")
    family = family_of(config, 10 if config.network.labels else None)
    denoiser = family.denoiser(family.build(1, 8).eval())
    monitor = ICRMonitor(denoiser, digits_inputs.images, config.protocol(), labels=digits_inputs.labels)
    values = monitor.measure(0).values
    assert "repr/far_error_ratio" in values
    assert not any(key.startswith("repr_class/") for key in values)


# Closed forms


class BestVelocity(nn.Module):
    """E[noise - x | x_t] for clean x of variance c^2."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c, self.labels = c, torch.empty(0)

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        t = (time / 1000).view(-1, 1, 1, 1)
        self.labels = torch.empty(0) if class_labels is None else class_labels
        return (t - (1 - t) * self.c**2) / ((1 - t) ** 2 * self.c**2 + t**2) * x


def test_the_best_velocity_of_a_gaussian_is_its_posterior_mean_and_its_flow_is_exact() -> None:
    c = 0.5
    denoiser = FlowDenoiser(BestVelocity(c))
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.01, 0.25, 1.0, 5.0, 80.0])
    expected = c**2 / (c**2 + sigma**2).view(-1, 1, 1, 1) * x
    torch.testing.assert_close(denoiser(x, sigma), expected, rtol=1e-4, atol=1e-5)
    # The marginal's standard deviation goes from 1 to c, and the flow only scales: noise becomes c noise.
    errors = [float((denoiser.sample(x, num_steps=n) - c * x).abs().max()) for n in (8, 16, 32)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0  # second order: a quarter each time
    assert errors[2] < 2e-3
    # The same ODE in sigma, from 80 instead of from infinity.
    torch.testing.assert_close(heun_sample(denoiser, x, num_steps=64), c * x, rtol=0, atol=2e-2)
    assert float((sample(denoiser, x, num_steps=32) - c * x).abs().max()) == errors[2]


def test_a_denoiser_of_classes_is_told_the_null_class_unless_it_is_told_others() -> None:
    network = BestVelocity(1.0)
    denoiser = FlowDenoiser(network, null_class=7)
    x = torch.zeros(3, 1, 2, 2)
    denoiser(x, 0.3)
    assert network.labels.tolist() == [7, 7, 7]
    denoiser(x, 0.3, torch.tensor([1, 2, 7]))
    assert network.labels.tolist() == [1, 2, 7]
    with pytest.raises(ValueError, match="time_scale is 0; expected a positive number"):
        FlowDenoiser(network, time_scale=0)


class Silent(nn.Module):
    """Says nothing, and remembers what it was asked."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.x, self.time = x, time
        return torch.zeros_like(x)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_ddpm_loss_is_that_of_the_schedulers_own_noise_and_velocity(prediction: str) -> None:
    family = family_of(configured("ddpm", prediction=prediction, beta_schedule="linear"))
    scheduler: Any = DDPMScheduler()
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1, torch.randn(4, 1, 8, 8, generator=generator)
    t, network = torch.tensor([0, 100, 500, 999]), Silent()
    found = family.loss(family.denoiser(network), x, t.float(), noise)
    abar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    targets = {"epsilon": noise, "v": scheduler.get_velocity(x, noise, t), "x0": (abar / (1 - abar)).sqrt() * x}
    assert float(found) == pytest.approx(float(targets[prediction].square().mean()), rel=1e-4)
    torch.testing.assert_close(network.x, scheduler.add_noise(x, noise, t), rtol=1e-4, atol=1e-5)
    drawn = family.draw(np.random.default_rng(0), 4000)
    assert set(drawn.tolist()) <= set(range(1000))
    assert float(drawn.mean()) == pytest.approx(499.5, abs=4 * 1000 / 12**0.5 / 4000**0.5)


def test_sit_begins_as_identity_and_its_blocks_share_one_embedding() -> None:
    family = family_of(configured("flow-labels"), 10)
    network: Any = family.build(1, 8)
    x, noise = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    loss = family.loss(family.denoiser(network), x, torch.tensor([0.2, 0.9]), noise, torch.tensor([3, 10]))
    assert float(loss.detach()) == pytest.approx(float((noise - x).square().mean()), rel=1e-6)  # zeros come out
    first = network.transformer_blocks[0].norm1
    assert all(block.norm1.emb is first.emb for block in network.transformer_blocks)
    assert first.emb.class_embedder.embedding_table.num_embeddings == 11
    nn.init.normal_(first.linear.weight)
    nn.init.normal_(network.proj_out_2.weight)
    network.train()
    torch.manual_seed(0)
    labels = torch.zeros(64, dtype=torch.int64)
    y = network(x[:1].expand(64, -1, -1, -1), torch.zeros(64), labels).sample
    assert torch.allclose(y, y[:1].expand_as(y), atol=1e-6)  # the network itself drops no labels


# Training, and the folders it leaves


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits_inputs: Inputs) -> dict[str, Path]:
    """A folder of each family, trained on digits until its loss on fixed noise has fallen."""
    folders = {}
    for name in FAMILIES:
        config = configured(name, learning_rate=3e-3)
        family, state, accelerator = started(config)
        inputs = digits_inputs if config.network.labels else Inputs(digits_inputs.images)
        loss = LossMonitor(
            family.denoiser(state.network), lambda *a, f=family, s=state: f.loss(f.denoiser(s.network), *a), family.draw,
            inputs.images, inputs.images,
        )  # fmt: skip
        before, steps = loss.measure(0).values["loss/train_eval"], train(state, inputs, family, accelerator)
        for _ in range(40):
            next(steps)
        after = loss.measure(1).values["loss/train_eval"]
        assert after < 0.7 * before, (name, before, after)
        folders[name] = tmp_path_factory.mktemp("saved") / name
        family.save(folders[name], state.ema)
    folders["latent-labels"] = tmp_path_factory.mktemp("saved") / "latent-labels"  # untrained: only the way is of interest
    family = family_of(configured("ddpm-v-labels"), 10)
    family.save(folders["latent-labels"], family.build(2, 4), latent=True)
    place_autoencoder(folders["latent-labels"], Autoencoder(tiny_autoencoder()), folders["latent-labels"].parent)
    return folders


def test_plain_diffusers_samples_what_each_family_saves_as_our_sampler_does(trained: dict[str, Path], tmp_path: Path) -> None:
    found = sampled_by_diffusers(tmp_path, *trained.values())
    kinds = {name: kind for name, (kind, _) in found.items()}
    assert kinds == {
        "edm-labels": "ConsistencyModelPipeline", "ddpm": "DDPMPipeline", "ddpm-v-labels": "ConsistencyModelPipeline",
        "flow": "NoiseToImagePipeline", "flow-labels": "NoiseToImagePipeline", "latent-labels": "NoiseToImagePipeline",
    }  # fmt: skip
    for name, (_, images) in found.items():
        assert not list(trained[name].rglob("*.bin")), name
        denoiser, side = load_denoiser(trained[name])
        assert side == 8
        shape = (3, 2, 4, 4) if isinstance(denoiser, LatentDenoiser) else (3, 1, 8, 8)
        noise = torch.randn(shape, generator=torch.manual_seed(3))
        inner = denoiser.denoiser if isinstance(denoiser, LatentDenoiser) else denoiser
        if isinstance(inner, SchedulerDenoiser):  # from where its own schedule starts
            low, high = (float(inner.log_sigmas[i].exp()) for i in (0, -1))
            ours = heun_sample(inner, noise, num_steps=25, sigma_min=low, sigma_max=high)
            ours = denoiser.decode(ours) if isinstance(denoiser, LatentDenoiser) else ours
        else:
            ours = sample(denoiser, noise, num_steps=20)
        ours = (ours / 2 + 0.5).clamp(0, 1)
        # Two solvers of one ODE, from the same noise: nearer by far than two samples are.
        distance, scale = float((images - ours).abs().mean()), float((images - images.roll(1, 0)).abs().mean())
        assert distance < 0.1 * scale, (name, distance, scale)


def test_a_folder_that_needs_its_own_code_says_so(trained: dict[str, Path]) -> None:
    from diffusers import DiffusionPipeline

    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(trained["flow"])
    pipeline: Any = DiffusionPipeline.from_pretrained(
        trained["flow-labels"], custom_pipeline=str(trained["flow-labels"]), trust_remote_code=True
    )
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "output_type": "pt"}
    images = [
        pipeline(class_labels=[3, 10], guidance_scale=g, generator=torch.manual_seed(0), **options).images for g in (1.0, 3.0)
    ]
    assert images[0].shape == (2, 1, 8, 8)
    assert not torch.allclose(images[0][0], images[1][0])
    torch.testing.assert_close(images[0][1], images[1][1])  # the null class is guided nowhere
    with pytest.raises(ValueError, match=r"class_labels is \[11\]; expected numbers from 0 to 10"):
        pipeline(class_labels=[11], **options)


def test_the_monitor_reads_the_null_class(trained: dict[str, Path], digits: Tensor) -> None:
    for name in ("edm-labels", "ddpm-v-labels", "flow-labels"):
        denoiser: Any = load_denoiser(trained[name])[0]
        monitor = ICRMonitor(denoiser, digits, configured(name).protocol())
        views = next(monitor.reader.views(0.29, torch.device("cpu"))).flatten(0, 1)
        outputs = []
        for label in (None, 10, 3):
            labels = None if label is None else torch.full((len(views),), label)
            with torch.no_grad():
                outputs.append(denoiser(views, 0.29, labels))
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)
        assert 0 < monitor.measure(1).values["repr/icr"] < 1


def test_labels_are_dropped_by_keys(digits_inputs: Inputs) -> None:
    family = family_of(configured("flow-labels", label_dropout=0.25, batch_size=64), 10)
    order = Order(64, 0)
    batches = [draw_batch(digits_inputs, order, family, 64 * i) for i in range(60)]
    again = draw_batch(digits_inputs, order, family, 64 * 7)
    assert batches[7].labels is not None
    assert again.labels is not None
    assert torch.equal(batches[7].labels, again.labels)
    dropped = torch.cat([b.labels == 10 for b in batches]).float()  # type: ignore[union-attr]
    assert float(dropped.mean()) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / len(dropped)) ** 0.5)
    halves = [again.part(i, 2).labels for i in (0, 1)]
    assert torch.equal(torch.cat(halves), again.labels)  # type: ignore[arg-type]
    assert draw_batch(Inputs(digits_inputs.images), order, family, 0).labels is None

"""The paper's experiment at the paper's scale: its configurations take a step."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mlflow_icr.extraction.latents import Autoencoder, encode_images
from mlflow_icr.extraction.taps import resolve_layer
from trainers.experiments.paper.plan import (
    DUPLICATES,
    EDM_FEW,
    EDM_MANY,
    FLOW_FEW,
    FLOW_MANY,
    LATENT_FEW,
    PAPER,
    SMALL,
)
from trainers.experiments.paper.preparations import train_autoencoder
from trainers.families import family_of
from trainers.inputs import Inputs
from trainers.loop import new_state, train


def test_the_paper_s_scale_is_a_configuration_and_takes_a_step(tmp_path: Path) -> None:
    for scale in (SMALL, PAPER):
        trainings = scale.trainings()
        assert len([t for t in trainings if t.role == EDM_FEW]) >= 3, "a turn is judged on three seeds"
        for training in trainings:
            config = training.config("uoft-cs/cifar10", tmp_path)
            assert config.data.num_images == training.images
    small = next(t for t in SMALL.trainings() if t.role == EDM_FEW).config("uoft-cs/cifar10", tmp_path).changed(sigma_data=0.5)
    for layer in SMALL.layers:
        assert resolve_layer(family_of(small).build(3, 16), layer)
    few = next(t for t in PAPER.trainings() if t.role == EDM_FEW).config("uoft-cs/cifar10", tmp_path)
    assert (few.data.num_images, few.data.resolution, few.optimizer.batch_size) == (4096, 32, 512)


@pytest.mark.slow  # networks of up to 60 million parameters
@pytest.mark.parametrize("role", [EDM_FEW, EDM_MANY, FLOW_FEW, FLOW_MANY, DUPLICATES, LATENT_FEW])
def test_each_training_of_the_paper_s_scale_takes_a_step(role: str, tmp_path: Path) -> None:
    training = next(training for training in PAPER.trainings() if training.role == role)
    config = training.config("uoft-cs/cifar10", tmp_path)
    config = config.changed(batch_size=2, **({"sigma_data": 0.5} if config.network.family == "edm" else {}))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8))
    labels = torch.arange(4) if config.network.labels else None
    inputs = Inputs(images, labels)
    if role == LATENT_FEW:
        plan = replace(PAPER.autoencoder, kimg=0.002, batch_size=2)
        autoencoder = Autoencoder(train_autoencoder(plan, images, 0, lambda: False))
        inputs = Inputs(encode_images(autoencoder, images), None, latent=True)
        config.check_network(16)
    family = family_of(config, None if labels is None else 10)
    network = family.build(*((4, 16) if role == LATENT_FEW else (3, 32)))
    if role == EDM_FEW:
        assert all(resolve_layer(network, layer) for layer in PAPER.layers)
    before = [weights.detach().clone() for weights in network.parameters()]
    accelerator = Accelerator(cpu=True)
    state = new_state(network, config, accelerator)
    state.images_seen = int(1000 * config.optimizer.rampup_kimg)
    with closing(train(state, inputs, family, accelerator)) as steps:
        next(steps)
    assert np.isfinite(float(state.loss_sum))
    changed = [bool((a != b).any()) for a, b in zip(before, network.parameters(), strict=True) if b.requires_grad]
    # A transformer's gates begin at zero: before them nothing has a gradient in the first step.
    assert any(changed) if config.network.family == "flow" else np.mean(changed) > 0.9

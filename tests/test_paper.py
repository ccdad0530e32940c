"""The paper's reproduction: its chain on tiny runs, its numbers against numpy and scikit-learn, its rules on made curves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from trainers.experiments.paper import features as read
from trainers.experiments.paper.claims import ABSENT, AGREES, DISAGREES, UNDECIDED, all_claims, turn_claim
from trainers.experiments.paper.command import figure_numbers, reproduce
from trainers.experiments.paper.plan import EDM_FEW, PAPER, SMALL, Scale
from trainers.experiments.paper.readings import READINGS
from trainers.train import main

TINY = Scale(
    name="tiny", few=32, many=200, few_kimg=0.6, many_kimg=0.6, seeds=(0,),
    common={
        "resolution": 8, "num_heldout": 120, "measurements": 6, "first_measurement_kimg": 0.1, "num_samples": 16,
        "sample_steps": 2, "generate_every": "6", "probe_images": 32, "probe_views": 4, "log_models": "none",
    },
    edm={"family": "edm", "block_channels": (8, 16), "batch_size": 32},
    flow={"family": "flow", "labels": True, "hidden_size": 32, "num_layers": 3, "num_heads": 2, "batch_size": 32},
    probe=32, views=4, samples=24, sample_steps=2, sigmas=(0.06, 0.3, 1.09), layers=("mid", "decoder"), subsets=(16, 64),
    labelled=60,
)  # fmt: skip


class Go:
    signal = None


def here(flags: Sequence[str], log: Path) -> int:
    """In this process: a new one takes seconds to import what is imported already."""
    return main(list(flags))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole chain, once."""
    root = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        assert reproduce(TINY, "digits", root, root / "page", figure_numbers("all"), stop=Go(), train=here) == 0  # type: ignore[arg-type]
    return root


def test_the_page_has_thirteen_figures_and_statements(study: Path) -> None:
    text = (study / "page" / "index.md").read_text()
    claims = json.loads((study / "page" / "claims.json").read_text())
    assert [claim["figure"] for claim in claims] == sorted(READINGS) == list(range(2, 15))
    assert {claim["outcome"] for claim in claims} <= {AGREES, DISAGREES, UNDECIDED, ABSENT}
    for claim in claims:
        picture = study / "page" / f"figure-{claim['figure']:02d}.png"
        assert picture.stat().st_size > 3000
        assert picture.name in text
        assert READINGS[claim["figure"]] in text
    for when in ("before", "at", "after"):
        assert (study / "page" / f"figure-06-{when}.png").stat().st_size > 1000
        assert f"figure-06-{when}.png" in text
    assert "4 of 4 trainings are measured" in text.replace("\n", " ")


def test_figures_again_from_the_result_files_are_the_same_bytes(study: Path, tmp_path: Path) -> None:
    # Without one checkpoint's weights: what is there is not measured again.
    shutil.copytree(study / "results", tmp_path / "results")
    shutil.copytree(study / "runs", tmp_path / "runs")
    for weights in (tmp_path / "runs").rglob("*.safetensors"):
        weights.write_bytes(b"")
    again = reproduce(TINY, "digits", tmp_path, tmp_path / "page", figure_numbers("all"), stop=Go(), train=None)  # type: ignore[arg-type]
    assert again == 0
    for path in sorted((study / "page").iterdir()):
        assert path.read_bytes() == (tmp_path / "page" / path.name).read_bytes(), path.name


def by_hand(features: np.ndarray) -> dict[str, float]:
    """ICR and traces of features (N, 2, D) by the paper's estimator, appendix B.6, in numpy."""
    first, second = features[:, 0], features[:, 1]
    residual = np.cov((first - second).T) / 2
    invariant = np.cov(((first + second) / 2).T) - np.cov((first - second).T) / 4
    eigenvalues = np.linalg.eigvals(np.linalg.solve(residual, invariant)).real
    return {"icr": 1 / (1 + eigenvalues.mean()), "trace_invariant": np.trace(invariant), "trace_residual": np.trace(residual)}


def test_values_are_those_of_an_independent_computation() -> None:
    rng = np.random.default_rng(3)
    labels = torch.from_numpy(rng.integers(0, 4, 90))
    centre = rng.normal(size=(4, 6))[labels.numpy()] + rng.normal(size=(90, 6))
    features = torch.from_numpy(centre[:, None] + 0.7 * rng.normal(size=(90, 2, 6)))
    found = read.trajectory_values(features, labels)
    z = (features / features.norm(dim=-1, keepdim=True)).numpy()
    assert found["icr"] == pytest.approx(by_hand(features.numpy())["icr"], rel=1e-9)
    for key in ("trace_invariant", "trace_residual"):
        assert found[key] == pytest.approx(by_hand(z)[key], rel=1e-9)
    assert found["alignment"] == pytest.approx(np.square(z[:, 0] - z[:, 1]).sum(1).mean(), rel=1e-9)
    assert found["silhouette"] == pytest.approx(silhouette_score(z[:, 0], labels.numpy()), rel=1e-9)
    s = features.numpy().mean(1) - features.numpy().mean((0, 1))
    near = NearestNeighbors(n_neighbors=10, metric="cosine").fit(s).kneighbors(s, return_distance=False)[:, 1:]
    agreement = (labels.numpy()[near] == labels.numpy()[:, None]).mean(1)
    assert found["neighbour_agreement"] == pytest.approx(agreement.mean(), rel=1e-9)
    assert found["neighbour_agreement_error"] == pytest.approx(agreement.std(ddof=1) / 90**0.5, rel=1e-9)
    rows = read.subset_values(features, (16, 40))
    assert [row["images"] for row in rows] == [16, 40, 90]
    assert rows[-1]["icr"] == pytest.approx(found["icr"], rel=1e-9)


def curve(icr: list[float], copies: list[float], rise_low: float) -> dict[str, Any]:
    rows = [
        {"images_seen": 1000 * 2**i, "icr_debiased": v, "rise_low": rise_low, "copies": c, "copies_low": c}
        for i, (v, c) in enumerate(zip(icr, copies, strict=True))
    ]
    return {"role": EDM_FEW, "trajectory": [{"images_seen": 0}, *rows]}


TURNS = curve([0.8, 0.7, 0.6, 0.65, 0.7], [0, 0, 0, 0.2, 0.6], 0.02)
FALLS = curve([0.8, 0.7, 0.6, 0.55, 0.5], [0, 0, 0, 0.2, 0.6], -0.01)
LATE = curve([0.8, 0.7, 0.68, 0.6, 0.7], [0, 0.1, 0.2, 0.2, 0.6], 0.02)
CLEAN = curve([0.8, 0.7, 0.6, 0.65, 0.7], [0, 0, 0, 0, 0], 0.02)


@pytest.mark.parametrize(
    ("runs", "outcome"),
    [
        ([TURNS] * 3, AGREES),
        ([FALLS] * 3, DISAGREES),
        ([LATE] * 3, DISAGREES),
        ([TURNS, TURNS, FALLS], UNDECIDED),
        ([CLEAN] * 3, UNDECIDED),
        ([], ABSENT),
    ],
)
def test_a_turn_is_judged_on_every_seed(runs: list[dict[str, Any]], outcome: str) -> None:
    results = {f"edm-few-seed{i}": run for i, run in enumerate(runs)}
    assert turn_claim(results, 4, EDM_FEW, "EDM").outcome == outcome


def test_without_results_nothing_is_claimed() -> None:
    assert {claim.outcome for claim in all_claims({})} == {ABSENT}


def test_the_paper_s_scale_is_a_configuration_and_takes_a_step(tmp_path: Path) -> None:
    for scale in (SMALL, PAPER):
        trainings = scale.trainings()
        assert len([t for t in trainings if t.role == EDM_FEW]) >= 3, "a turn is judged on three seeds"
        for training in trainings:
            config = training.config("uoft-cs/cifar10")
            assert config.data.num_images == training.images
    few = next(t for t in PAPER.trainings() if t.role == EDM_FEW).config("uoft-cs/cifar10")
    assert (few.data.num_images, few.data.resolution, few.optimizer.batch_size) == (4096, 32, 512)


def test_numbers_of_figures_are_checked() -> None:
    assert figure_numbers("4,2") == [2, 4]
    with pytest.raises(ValueError, match=r"figures is '1'; expected all, or some of 2, 3"):
        figure_numbers("1")
    assert replace(TINY, name="x").trainings() == TINY.trainings()

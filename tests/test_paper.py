"""The paper's reproduction: its chain on tiny runs, its numbers against numpy and scikit-learn, its rules on made curves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score
from sklearn.metrics.pairwise import cosine_distances
from sklearn.neighbors import NearestNeighbors

from mlflow_icr import sweep_noise
from tests.stores import new_store
from trainers.config import read_values
from trainers.experiments.paper import features as read
from trainers.experiments.paper import image_pages
from trainers.experiments.paper.claims import ABSENT, AGREES, DISAGREES, UNDECIDED, all_claims, turn_claim
from trainers.experiments.paper.command import figure_numbers, reproduce
from trainers.experiments.paper.measurements import Folder, Measured, as_bytes
from trainers.experiments.paper.plan import (
    DUPLICATES,
    EDM_FEW,
    EDM_MANY,
    FLOW_FEW,
    FLOW_MANY,
    LATENT_FEW,
    AutoencoderPlan,
    Scale,
)
from trainers.experiments.paper.readings import READINGS
from trainers.experiments.paper.trainings import config_of
from trainers.train import main, prepare_folder

TINY = Scale(
    name="tiny", few=32, many=200, few_kimg=0.6, many_kimg=0.6, seeds=(0,),
    common={
        "resolution": 8, "num_heldout": 120, "measurements": 6, "first_measurement_kimg": 0.1, "num_samples": 4,
        "sample_steps": 2, "generate_every": "6", "probe_images": 32, "probe_views": 4, "log_models": "none",
        "encoder": "pixels",
    },
    edm={"family": "edm", "block_channels": (8, 16), "batch_size": 32},
    flow={"family": "flow", "labels": True, "hidden_size": 32, "num_layers": 3, "num_heads": 2, "batch_size": 32},
    probe=32, views=4, samples=24, sample_steps=2, sigmas=(0.06, 0.3, 1.09), layers=("mid", "mid+2"), subsets=(16, 64),
    labelled=60, autoencoder=AutoencoderPlan((8, 16), kimg=0.06, batch_size=20),
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
        patch.setenv("MLFLOW_TRACKING_URI", new_store(root / "mlflow.db"))
        # What the trainings themselves measure is not read here, and is two thirds of their time.
        patch.setattr("mlflow_icr.monitoring.errors.ERROR_IMAGES", 16)
        patch.setattr("mlflow_icr.monitoring.errors.LEVEL_IMAGES", 4)
        assert reproduce(TINY, "digits", root, root / "page", figure_numbers("all"), stop=Go(), train=here) == 0  # type: ignore[arg-type]
    return root


def test_the_page_has_thirteen_figures_and_statements(study: Path) -> None:
    text = (study / "page" / "index.md").read_text()
    claims = json.loads((study / "page" / "claims.json").read_text())
    assert [claim["figure"] for claim in claims] == [*sorted(READINGS), "latents", "outliers", "duplicates"]
    assert sorted(READINGS) == list(range(2, 15))
    assert {claim["outcome"] for claim in claims} <= {AGREES, DISAGREES, UNDECIDED, ABSENT}
    for claim in claims[13:]:
        assert (study / "page" / f"figure-{claim['figure']}.png").stat().st_size > 3000
    for role in ("edm-few", "edm-duplicates"):
        assert (study / "page" / f"copies-{role}.png").stat().st_size > 1000
        assert f"copies-{role}.png" in text
    assert "finds these repeats before training: 8 groups of 10." in text
    for claim in claims[:13]:
        picture = study / "page" / f"figure-{claim['figure']:02d}.png"
        assert picture.stat().st_size > 3000
        assert picture.name in text
        assert READINGS[claim["figure"]] in text
    for when in ("before", "at", "after"):
        assert (study / "page" / f"figure-06-{when}.png").stat().st_size > 1000
        assert f"figure-06-{when}.png" in text
    assert "6 of 6 trainings are measured" in text.replace("\n", " ")


def test_each_of_the_likeliest_copied_images_has_a_page(study: Path, runs: dict[str, Measured]) -> None:
    page, index = study / "page", (study / "page" / "index.md").read_text()
    for role in ("edm-few", "edm-duplicates"):
        own = sorted(page.glob(f"{role}-image-*.md"))
        assert len(own) == image_pages.LISTED
        for path in own:
            assert f"({path.name})" in index
            text = path.read_text()
            pictures = re.findall(r"\]\((\S+\.png)\)", text)
            assert len(pictures) == 2
            assert all((page / name).stat().st_size > 300 for name in pictures)
            image = int(path.stem.rpartition("-")[2])
            assert text.startswith(f"# Image {image} of {role}-seed0\n")
            # The first tile of its row is the image itself.
            with Image.open(page / f"{path.stem}-row.png") as row:
                pixels = np.asarray(row)[..., 0]
            side = len(pixels) // 8
            images = runs[role].images
            assert np.array_equal(pixels[side // 2 :: side, side // 2 :: side][:, :8], as_bytes(images[[image]])[0, 0].numpy())


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


@pytest.mark.parametrize("name", ["edm-few-seed0", "flow-few-seed0", "latent-few-seed0"])
def test_a_training_that_was_stopped_can_be_resumed(study: Path, name: str) -> None:
    """The file that the study gives it is no other configuration than the run's own."""
    wanted = read_values(study / "runs" / f"{name}.yaml")
    folder = study / "runs" / name
    assert prepare_folder(folder, None, wanted, resume=True) == config_of(folder)
    with pytest.raises(ValueError, match="seed is 5, but the run to resume has 0"):
        prepare_folder(folder, None, wanted | {"seed": 5}, resume=True)


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


def test_numbers_of_figures_are_checked() -> None:
    assert figure_numbers("4,2") == [2, 4]
    with pytest.raises(ValueError, match=r"figures is '1'; expected all, or some of 2, 3"):
        figure_numbers("1")
    assert replace(TINY, name="x").trainings() == TINY.trainings()


def two_way(features: torch.Tensor) -> dict[str, float]:
    """ICR, debiased too, and traces of features (N, K, D) by two-way analysis of variance and generalised eigenvalues."""
    h = features.double().numpy()
    n, k, d = h.shape
    means = h.mean(1)
    r = h - means[:, None] - h.mean(0)[None] + h.mean((0, 1))
    freedom = (n - 1) * (k - 1)
    residual = sum(np.outer(row, row) for row in r.reshape(-1, d)) / freedom
    invariant = np.cov(means.T) - residual / k
    mean = float(scipy.linalg.eigvals(invariant, residual).real.mean())
    between = float(np.trace(scipy.linalg.solve(residual, np.cov(means.T))))
    debiased = (freedom - d - 1) / freedom * between / d - 1 / k
    return {
        "icr": 1 / (1 + mean), "icr_debiased": 1 / (1 + max(0.0, debiased)), "trace_invariant": np.trace(invariant),
        "trace_residual": np.trace(residual),
    }  # fmt: skip


def unit(features: torch.Tensor) -> torch.Tensor:
    return features.double() / features.double().norm(dim=-1, keepdim=True)


def same(found: Any, expected: float, rel: float = 1e-5) -> None:
    assert found == pytest.approx(expected, rel=rel, abs=1e-9)


@pytest.fixture(scope="module")
def runs(study: Path) -> dict[str, Measured]:
    return {training.role: Measured(TINY, training, Folder(study)) for training in TINY.trainings()}


@pytest.mark.parametrize("role", [EDM_FEW, EDM_MANY, FLOW_FEW, LATENT_FEW])
def test_values_over_training_are_those_of_numpy_and_scikit_learn(runs: dict[str, Measured], role: str) -> None:
    """Figures 3 to 7, 10 and 11, each from the checkpoint's own features and samples."""
    run = runs[role]
    last, row = max(run.checkpoints), run.trajectory()[-1]
    denoiser = run.denoiser(last)
    features, z = run.features(denoiser), unit(run.features(denoiser))
    for key in ("icr", "icr_debiased"):
        same(row[key], two_way(features)[key])
    for key in ("trace_invariant", "trace_residual"):
        same(row[key], two_way(z)[key])
    pairs = [np.square((z[:, i] - z[:, j]).numpy()).sum(1).mean() for i, j in combinations(range(TINY.views), 2)]
    same(row["alignment"], float(np.mean(pairs)))
    if run.labels is not None:
        labels = run.labels.numpy()
        same(row["silhouette"], silhouette_score(z[:, 0].numpy(), labels))
        far = cosine_distances(features.flatten(0, 1).double().numpy())
        member = labels.repeat(TINY.views)
        blocks = [[far[np.ix_(member == a, member == b)].mean() for b in np.unique(labels)] for a in np.unique(labels)]
        same(row["class_separation"], 1 - float(np.diag(blocks).mean() / np.mean(blocks)))
    base, mine = (run.row(step)["influence"] for step in (lowest_step(run), last))
    change = np.array(mine) - np.array(base)
    if change.any():
        reach = scipy.stats.t.ppf(0.975, len(change) - 1) * scipy.stats.sem(change)
        same(row["rise_low"], row["rise"] - float(reach))
    samples, real, heldout = (x.flatten(1).numpy() / 255 for x in (run.samples(denoiser), run.unique, run.data.heldout))
    far, _ = NearestNeighbors(n_neighbors=2).fit(real).kneighbors(samples)
    copies, n = int((far[:, 0] < far[:, 1] / 3).sum()), len(samples)
    same(row["copies"], copies / n)
    same(row["copies_high"], scipy.stats.beta.ppf(0.975, copies + 1, n - copies) if copies < n else 1.0)
    same(row["copies_low"], scipy.stats.beta.ppf(0.025, copies, n - copies + 1) if copies else 0.0)
    a, b = np.cov(samples.T), np.cov(heldout.T)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()  # tr(sqrtm(a b)), of a product without full rank
    same(row["frechet_pixels"], float(np.square(samples.mean(0) - heldout.mean(0)).sum() + np.trace(a + b) - 2 * root), 1e-4)


def lowest_step(run: Measured) -> int:
    rows = [row for row in run.trajectory() if row["images_seen"] > 0]
    return int(min(rows, key=lambda row: row["icr_debiased"])["images_seen"])


@pytest.mark.parametrize("role", [EDM_FEW, EDM_MANY, FLOW_MANY])
def test_windows_are_those_of_numpy_and_scikit_learn(
    runs: dict[str, Measured], role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures 2, 8 and 9; the probe's features are those that the sweep asked it about."""
    asked: list[float] = []

    def probe(train: torch.Tensor, y: torch.Tensor, test: torch.Tensor, y_test: torch.Tensor) -> float:
        mean, deviation = train.mean(0), train.double().std(0, correction=0).float()
        fitted = LogisticRegression(max_iter=2000).fit(((train - mean) / deviation).numpy(), y.numpy())
        asked.append(float((fitted.predict(((test - mean) / deviation).numpy()) == y_test.numpy()).mean()))
        return asked[-1]

    run = runs[role]
    known, step = run.window(max(run.checkpoints)), max(run.checkpoints)
    monkeypatch.setattr("mlflow_icr.monitoring.sweep.linear_probe_accuracy", probe)
    again = Measured(TINY, run.training, Folder(run.folder.root))
    again.folder = Folder(tmp_path)
    found = again.window(step)
    assert [point["accuracy"] for point in known] == pytest.approx([point["accuracy"] for point in found], abs=0.02)
    assert [point["accuracy"] for point in found] == asked
    for point in known:
        views = sweep_noise(run.denoiser(step), run.images, sigmas=[point["sigma"]], layers=["decoder"]).num_views
        features = read.read_features(run.denoiser(step), run.images, layer="decoder", sigma=point["sigma"], views=views)
        same(point["icr_debiased"], two_way(features)["icr_debiased"])
        for key in ("trace_invariant", "trace_residual"):
            same(point[key], two_way(unit(features))[key])


def test_subsets_levels_and_layers_are_those_of_numpy(runs: dict[str, Measured]) -> None:
    """Figures 12 to 14."""
    rich, few = runs[EDM_MANY], runs[EDM_FEW]
    step = max(rich.checkpoints)
    images = rich.data.train[: max(TINY.subsets)]
    features = read.read_features(rich.denoiser(step), images, layer="decoder", sigma=rich.sigma, views=2)
    order = np.random.default_rng(0).permutation(len(features))
    rows = rich.subsets(step)
    assert [row["images"] for row in rows] == [16, 64]
    same(rows[1]["icr_debiased"], two_way(features[order[:64]])["icr_debiased"], 1e-4)
    assert "absent" in rows[0], "16 images in 16 dimensions have no inverse"
    step = max(few.checkpoints)
    for kind, rows in (("level", few.levels()), ("layer", few.layers())):
        for row in rows[-2:]:
            chosen = {"level": int(row["what"].split()[1])} if kind == "level" else {"layer": row["what"]}
            same(row["icr_debiased"], two_way(few.features(few.denoiser(step), **chosen))["icr_debiased"], 1e-4)


def test_features_are_of_all_images(runs: dict[str, Measured]) -> None:
    run = runs[EDM_MANY]
    images = run.data.train.repeat(6, 1, 1, 1)
    features = read.read_features(run.denoiser(max(run.checkpoints)), images, layer="decoder", sigma=0.3, views=2)
    assert len(features) == len(images) == 1200


def test_of_repeated_images_one_is_measured(runs: dict[str, Measured]) -> None:
    run, few = runs[DUPLICATES], runs[EDM_FEW]
    assert sorted(run.times) == [1] * (TINY.few - 8) + [10] * 8
    assert {image.numpy().tobytes() for image in run.unique} == {image.numpy().tobytes() for image in few.data.train}
    repeated = {run.unique[i].numpy().tobytes() for i, times in enumerate(run.times) if times == 10}
    assert repeated == {image.numpy().tobytes() for image in few.data.train[:8]}

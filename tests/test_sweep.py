"""Where to look and which images: sweeps over sigma and layers, rankings, neighbours."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mlflow_icr import EDMDenoiser, ICRMonitor, LabelledImages, Protocol, icr_interval, make_views, sweep_noise
from mlflow_icr.cli import main
from mlflow_icr.extraction import Tap, middle_layers
from mlflow_icr.monitoring.neighbours import invariant_part, nearest, residual_part
from mlflow_icr.monitoring.plots import sweep_figure
from mlflow_icr.monitoring.ranking import rank_classes, rank_images
from mlflow_icr.monitoring.sweep import NoiseSweep, SweepPoint
from mlflow_icr.tracking import Tracker


@pytest.fixture
def labels() -> torch.Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().target[:64])


def test_one_pass_reads_all_layers(small_unet: nn.Module, digits: torch.Tensor) -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = small_unet.conv_in.register_forward_hook(count)
    denoiser, x = EDMDenoiser(small_unet), digits[:5].float() / 127.5 - 1
    layers = middle_layers(small_unet)
    assert layers == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    with Tap(small_unet, *layers) as tap:
        together = tap.each(lambda: denoiser(x, 0.5))
    assert calls == 1
    for layer, features in zip(layers, together, strict=True):
        with Tap(small_unet, layer) as tap:
            assert torch.equal(tap(lambda: denoiser(x, 0.5)), features)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"without reaching layer 'down_blocks\.0'"), Tap(small_unet, "down_blocks.0") as tap:
        tap.each(lambda: None)


def test_a_sweep_is_icr_at_each_sigma_and_layer(small_unet: nn.Module, digits: torch.Tensor, labels: torch.Tensor) -> None:
    denoiser = EDMDenoiser(small_unet)
    sweep = sweep_noise(
        denoiser, digits, sigmas=(0.6, 0.1), layers=["mid", "decoder"], labelled=LabelledImages(digits, labels), batch_size=64
    )
    assert sweep.layers == ["mid_block", "up_blocks.0"]
    assert sweep.sigmas == [0.1, 0.6]
    assert sweep.num_views == 4  # the smallest K with 63 (K - 1) >= 4 x 32
    for point in sweep.points:
        views = make_views(digits, range(64), num_views=4, sigma=point.sigma, seed=0)
        with Tap(small_unet, point.layer) as tap:
            features = tap(lambda v=views, p=point: denoiser(v.flatten(0, 1), p.sigma)).view(64, 4, -1)  # type: ignore[misc]
        expected = icr_interval(features)
        # Another batch size rounds float32 convolutions differently; an ill-conditioned covariance magnifies it.
        assert (point.icr, point.low, point.high) == pytest.approx((expected.value, expected.low, expected.high), rel=2e-3)
        assert point.accuracy is not None
        assert 0 < point.accuracy < 1
    held = sweep_noise(
        denoiser,
        digits[:40],
        sigmas=[0.1],
        layers=["mid"],
        labelled=LabelledImages(digits[:40], labels[:40], digits[40:], labels[40:]),
    )
    assert held.points[0].accuracy in {i / 24 for i in range(25)}
    few = sweep_noise(denoiser, digits[:8], sigmas=[0.1], layers=["mid"], protocol=Protocol(num_views=2))
    assert few.points[0].icr is None
    assert "7 degrees of freedom for D = 32" in few.points[0].absent
    for bad, message in (
        ({"sigmas": ()}, "sigmas is ()"),
        ({"sigmas": (0.0,)}, "expected positive finite numbers"),
        ({"layers": ["nowhere"]}, "layer is 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            sweep_noise(denoiser, digits, **bad)  # type: ignore[arg-type]
    for sets, message in (
        ((digits, labels[:3]), "labels has 3 entries for 64 images"),
        ((digits, labels, digits, labels[:5]), "test_labels has 5 entries for 64 images"),
        ((digits, labels, digits), "go together"),
    ):
        with pytest.raises(ValueError, match=message):
            LabelledImages(*sets)


def test_rises_are_paired_differences_from_the_lowest(small_unet: nn.Module, digits: torch.Tensor) -> None:
    sweep = sweep_noise(EDMDenoiser(small_unet), digits, sigmas=(0.05, 0.3, 2.0), layers=["mid"])
    found = {}
    for point in sweep.points:
        views = make_views(digits, range(64), num_views=sweep.num_views, sigma=point.sigma, seed=0)
        with Tap(small_unet, "mid_block") as tap:
            features = tap(lambda v=views, p=point: EDMDenoiser(small_unet)(v.flatten(0, 1), p.sigma))  # type: ignore[misc]
        found[point.sigma] = icr_interval(features.view(64, sweep.num_views, -1))
    base = min(found.values(), key=lambda interval: interval.value)
    for point in sweep.points:
        mine = found[point.sigma]
        spread = float((mine.influence - base.influence).std())
        assert point.rise == pytest.approx(mine.value - base.value, abs=2e-3)
        assert point.rise_low == pytest.approx(mine.value - base.value - 1.998 * spread / 8, abs=4e-3)  # t of 63 degrees
    assert min(point.rise for point in sweep.points if point.rise is not None) == 0


def points(layer: str, icrs: list[float], half: float = 0.01, accuracies: list[float] | None = None) -> list[SweepPoint]:
    return [
        SweepPoint(
            0.1 * 2**i, layer, 8, icr, icr - half, icr + half, None if accuracies is None else accuracies[i],
            rise=icr - min(icrs), rise_low=icr - min(icrs) - half,
        )
        for i, icr in enumerate(icrs)
    ]  # fmt: skip


def test_the_best_sigma_and_layer_and_the_window() -> None:
    sweep = NoiseSweep(
        tuple(points("a", [0.6, 0.5, 0.45, 0.7], accuracies=[0.5, 0.9, 0.8, 0.2]) + points("b", [0.4, 0.41, 0.6, 0.8])), 9, 2
    )
    assert sweep.sigma_star("a") == pytest.approx(0.4)
    assert sweep.most_accurate_sigma("a") == pytest.approx(0.2)
    assert sweep.most_accurate_sigma("b") is None
    assert sweep.best_layer == "b"
    assert sweep.has_window("a")
    assert not sweep.has_window("b")  # monotone: the window is gone
    assert not NoiseSweep(tuple(points("a", [0.6, 0.5, 0.45, 0.7], half=0.2)), 9, 2).has_window("a")  # or in doubt
    figure = sweep_figure({"one": sweep, "two": sweep})
    assert [axes.get_xlabel() for axes in figure.axes[:4]] == ["sigma"] * 4
    assert "a" in sweep_figure({"one": sweep}, "a").axes[0].get_title()
    assert json.loads(json.dumps(sweep.as_dict()))["layers"]["a"]["has_window"] is True


def test_the_command_writes_table_and_figure(
    small_unet: nn.Module, digits: torch.Tensor, labels: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import ConsistencyModelPipeline, EDMDPMSolverMultistepScheduler

    ConsistencyModelPipeline(unet=small_unet, scheduler=EDMDPMSolverMultistepScheduler()).save_pretrained(tmp_path / "model")
    for i, image in enumerate(digits):
        folder = tmp_path / "images" / str(int(labels[i]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{i:03d}.png")
    command = [
        "sweep-noise",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "images"),
        "--sigma",
        "0.1",
        "0.5",
        "--layers",
        "mid",
    ]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    said = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert [float(row["icr"]) for row in rows] == [point["icr"] for point in said["points"]]
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    with Image.open(tmp_path / "out" / "sweep.png") as picture:
        assert picture.width > 500
    measure = ["measure", str(tmp_path / "model"), "--data", str(tmp_path / "images"), "--num-views", "2", "--num-images", "20"]
    assert main([*measure, "--shrinkage", "oas", "--companions", "rankme", "knn_accuracy"]) == 0
    captured = capsys.readouterr()
    assert {"repr/icr", "repr/rankme", "repr/knn_accuracy"} <= json.loads(captured.out).keys()
    assert "repr/icr_debiased is absent: the correction holds without shrinkage" in captured.err
    assert main([*measure, "--shrinkage", "none", "--projection", "99", "--images-seen", "9"]) == 2
    assert "projection is 99; expected at most 32" in capsys.readouterr().err
    assert main([*command, "--test-data", str(tmp_path / "out")]) == 2
    assert "one subfolder for each class" in capsys.readouterr().err


def test_images_and_classes_are_ranked() -> None:
    arrays = {
        "repr/residual_share": np.array([0.1, 0.5, 0.2, 0.2], dtype=np.float32),
        "repr/influence": np.array([-1.0, 2.0, 0.5, -1.5], dtype=np.float32),
        "label": np.array([7, 7, 3, 3]),
    }
    rows = rank_images(arrays)
    assert [row["image"] for row in rows] == [1, 2, 3, 0]  # equal shares in the order of the set
    assert rows[0] == {
        "rank": 1, "image": 1, "residual_share": 0.5, "relative_share": 2.0, "influence": 2.0, "label": 7
    }  # fmt: skip
    classes = rank_classes(arrays)
    assert [row["label"] for row in classes] == [7, 3]
    assert classes[0] == {"label": 7, "images": 2, "relative_share": pytest.approx(1.2), "influence": 0.5}
    assert rank_classes({"repr/residual_share": arrays["repr/residual_share"]}) == []
    assert "influence" not in rank_images({"repr/residual_share": arrays["repr/residual_share"]})[0]
    with pytest.raises(ValueError, match="no repr/residual_share; it has label"):
        rank_images({"label": arrays["label"]})


def test_neighbours_by_the_two_parts(rng: np.random.Generator) -> None:
    """Images 0 and 1 share a subject, 0 and 2 the residual of their first views: each part finds its own pair."""
    n, k, d = 30, 4, 16
    s, xi = rng.standard_normal((n, 1, d)), 0.5 * rng.standard_normal((n, k, d))
    s[1] = s[0] + 0.05 * rng.standard_normal(d)
    xi -= xi.mean(1, keepdims=True)
    xi[2, 0] = xi[0, 0]
    h = torch.from_numpy(s + xi)
    anchor = torch.tensor([0])
    assert nearest(invariant_part(h), anchor, 1).tolist() == [[1]]
    assert nearest(residual_part(h), anchor, 1).tolist() == [[2]]
    assert 0 not in nearest(invariant_part(h), anchor, 29)[0]


def test_a_monitor_pictures_and_a_folder_ranks(
    small_unet: nn.Module, digits: torch.Tensor, labels: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = ICRMonitor(EDMDenoiser(small_unet), digits, Protocol(num_views=4), labels=labels, pictures=True)
    report = monitor.measure(5)
    assert report.figures.keys() == {"neighbours_s", "neighbours_xi", "largest_residuals"}
    # Six anchors of 8x8 pixels, enlarged six-fold, each with nine neighbours; 64 images in rows of 16.
    assert report.figures["neighbours_s"].shape == (6 * 50 - 2, 10 * 50 - 2, 3)
    wall = report.figures["largest_residuals"]
    assert wall.shape == (4 * 50 - 2, 16 * 50 - 2, 3)
    worst = int(report.arrays["repr/residual_share"].argmax())
    assert np.array_equal(wall[:48:6, :48:6, 0], digits[worst, 0].numpy())
    tracker = Tracker(tmp_path, [])
    tracker.open({}, {})
    tracker.record(report)
    assert main(["rank-images", str(tmp_path), "--top", "4"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert int(rows[0]["image"]) == worst
    assert len(rows) == 4
    assert int(rows[0]["label"]) == int(labels[worst])
    assert main(["rank-images", str(tmp_path), "--classes"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 11
    assert main(["rank-images", str(tmp_path), "--step", "6"]) == 2
    assert "step is 6; expected one of 5" in capsys.readouterr().err

"""What a training is where nobody says follows from the data and the device, by the rules of the plan's table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from tests.family_runs import as_folder
from trainers import train
from trainers.command_line import train_parser
from trainers.config import config_from, read_values
from trainers.data import DataFacts
from trainers.families import family_of
from trainers.plan import Device, plan_values

CPU, GPU = Device("cpu"), Device("cuda", bf16=True)


@pytest.mark.parametrize("device", [CPU, Device("mps"), GPU])
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (33, 47), (192, 256), (3000, 17)])
def test_every_plan_is_a_configuration(device: Device, size: tuple[int, int]) -> None:
    for family, count in (("edm", 4), ("edm", 5000), ("ddpm", 60), ("flow", 2_000_000)):
        values = plan_values({"data": "x", "family": family}, DataFacts(count, size, 3, None), device)
        config = config_from(values | {"sigma_data": 0.5} if family == "edm" else values)
        assert config.data.num_images + config.data.num_heldout == count
    with torch.device("meta"):
        assert sum(p.numel() for p in family_of(config).build(3, config.data.size).parameters()) > 1e4


def test_the_plans_numbers_are_those_of_its_table() -> None:
    small = plan_values({"data": "x"}, DataFacts(1797, (8, 8), 1, 10), CPU)
    keys = ("resolution", "num_images", "num_heldout", "batch_size", "block_channels", "layers_per_block", "total_kimg")
    assert [small[key] for key in keys] == [8, 1618, 179, 64, (32, 64), 1, 1618.0]
    large = plan_values({"data": "x"}, DataFacts(60_000, (600, 800), 3, None), GPU)
    keys += ("attention_resolutions", "mixed_precision", "probe_images", "learning_rate", "first_measurement_kimg")
    assert [large[key] for key in keys] == [
        "192x256", 55_000, 5000, 16, (128, 256, 256, 256, 512, 512), 2, 55_000.0, (), "bf16", 4096, 2e-4, 1100.0,
    ]  # fmt: skip
    square = plan_values({"data": "x"}, DataFacts(5000, (64, 64), 3, None), GPU)
    assert (square["block_channels"], square["attention_resolutions"]) == ((128, 256, 256, 256, 512), (16, 8))
    assert square["batch_size"] == 64
    given = {"data": "x", "resolution": 16, "num_images": 100, "batch_size": 7, "total_kimg": 3.0, "block_channels": (8, 8)}
    kept = plan_values(given, DataFacts(5000, (64, 64), 3, None), GPU)
    assert {key: kept[key] for key in given} == given
    assert kept["attention_resolutions"] == (16, 8)


def test_data_alone_is_a_training_and_its_file_is_one_again(
    digits: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = as_folder(digits, tmp_path / "data")
    arguments = train_parser().parse_args([f"--data={folder}", "--total-kimg=5", f"--output-dir={tmp_path / 'run'}"])
    config = train.configure(arguments)[0]
    said = capsys.readouterr().out
    assert "data: 64 images of 8x8, 1 channels; device: " in said
    assert " batch_size=16 " in said
    assert "total_kimg" not in said  # it was given
    assert (config.preset, config.data.num_images, config.data.num_heldout) == ("", 58, 6)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.grouped()))
    again = train_parser().parse_args([f"--config={tmp_path / 'c.yaml'}", "--seed=3", f"--output-dir={tmp_path / 'run'}"])
    assert train.configure(again)[0] == config.changed(seed=3)
    assert config_from(read_values(tmp_path / "c.yaml")) == config


@pytest.mark.slow
def test_one_line_trains_measures_and_reports(digits: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    folder = as_folder(digits, tmp_path / "data")
    assert train.main([f"--data={folder}", "--total-kimg=0.5", f"--output-dir={tmp_path / 'run'}"]) == 0
    values = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert values["data"]["num_images"] == 58
    assert 0.3 < values["noise"]["sigma_data"] < 0.9  # measured
    assert (tmp_path / "run" / "report" / "index.html").exists()

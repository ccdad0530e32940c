"""Where data and output folders are: from any working directory, apart from each other, with the same images on resuming."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch import Tensor

from mlflow_icr.cli import main as commands
from mlflow_icr.extraction.pipelines import load_denoiser
from tests.family_runs import as_folder, configured
from tests.image_files import write_png
from trainers import train
from trainers.checkpoint import latest_checkpoint
from trainers.command_line import train_parser
from trainers.config import config_from
from trainers.places import settled_paths
from trainers.run import Run


def arguments(*flags: str) -> object:
    return train_parser().parse_args(["--total-kimg=1", *flags])


def test_paths_hold_from_any_working_directory(digits: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = as_folder(digits, tmp_path / "photos")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for given in ("photos", "photos/", "./photos/../photos", "~/photos"):
        config, output_dir, *_ = train.configure(arguments(f"--data={given}", "--output-dir=~/run"))
        assert config.data.source == str(folder)
        assert output_dir == tmp_path / "run"
    assert settled_paths({"data": "digits"}) == {"data": "digits"}
    assert settled_paths({"data": "someone/faces", "init_from": ""}) == {"data": "someone/faces", "init_from": ""}
    output_dir.mkdir()
    (output_dir / "config.yaml").write_text(yaml.safe_dump(config.grouped()))
    monkeypatch.chdir(output_dir)
    again, *_ = train.configure(arguments("--resume=auto", "--output-dir=.", "--data=../photos/"))
    assert again == config


def test_folders_that_cannot_be_used_are_one_line(digits: Tensor, tmp_path: Path) -> None:
    folder = as_folder(digits, tmp_path / "photos")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(folder)
    for data, output_dir, message in (
        (folder, folder / "run", r"output_dir is '.*photos/run', in data '.*photos', where its pictures would be read"),
        (folder, tmp_path / "link" / "run", "in data '.*photos', where its pictures would be read"),
        (folder, folder, "in data '.*photos', where its pictures would be read"),
        (folder, "", "output_dir is ''; expected a folder"),
        (folder, tmp_path / "file" / "run", "output_dir is '.*file/run', but '.*file' is a file; expected a folder"),
        (folder, "/proc/run", "output_dir is '/proc/run'; expected a folder that can be written, unlike '/proc'"),
        ("", tmp_path / "run", "data is ''; expected a folder, an archive, a file or a name"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            train.configure(arguments(f"--data={data}", f"--output-dir={output_dir}"))
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "photos"]


def test_a_group_is_no_class_and_a_folder_may_hold_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            write_png(tmp_path / "data" / name / f"{i}.png", np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8))
    line = [f"--data={tmp_path / 'data'}", "--total-kimg=1", "--encoder=pixels", f"--output-dir={tmp_path / 'run'}"]
    for flags, message in (
        (["--labels", "--group-by=folder"], "has no classes besides those of group_by 'folder'; expected subfolders"),
        ([f"--init-from={tmp_path / 'data'}"], "a name on the hub (it holds no model)"),
        (["--augment=flip", "--augment-probability=0.5"], "augment_probability is 0.5; expected nothing without augment edm"),
    ):
        assert train.main([*line, *flags]) == 2
        assert message in capsys.readouterr().err


def test_commands_check_where_and_how_they_read(
    digits: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = as_folder(digits, tmp_path / "photos")
    (folder / "model").mkdir()
    assert commands(["watch", f"--checkpoints={folder / 'model'}", f"--data={folder}"]) == 2
    assert "model/icr', in data '" in capsys.readouterr().err
    assert commands(["measure", str(folder), f"--data={folder}", "--resolution=0"]) == 2
    assert "resolution is 0; expected a whole number >= 1" in capsys.readouterr().err
    assert commands(["measure", str(folder), f"--data={folder}", "--batch-size=0"]) == 2
    assert "batch_size is 0; expected a whole number >= 1" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    assert commands(["measure", str(folder), "--generated=~/none", f"--train={folder}"]) == 2
    assert f"{str(tmp_path / 'none')!r} is neither a folder" in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_images_wherever_they_are(digits: Tensor, tmp_path: Path) -> None:
    folder = as_folder(digits, tmp_path / "photos")
    config = configured("ddpm", data=str(folder), num_images=32, num_heldout=4)
    out = tmp_path / "run"
    Run(config, out)._save()
    found = latest_checkpoint(out)
    assert found is not None
    assert load_denoiser(found, resolution=6)[1] == 6
    with pytest.raises(ValueError, match="resolution is 7; expected a multiple of 2, as the network's levels need"):
        load_denoiser(found, resolution=7)
    (out / "config.yaml").write_text(yaml.safe_dump(config.grouped()))
    moved = folder.rename(tmp_path / "moved")
    again = train.configure(arguments("--resume", f"--data={moved}", f"--output-dir={out}"))[0]
    assert again.data.source == str(moved)
    assert config_from(again.flat()).changed(data=str(folder), total_kimg=config.optimizer.total_kimg) == config
    Run(again, out, resume=True)
    for path in moved.glob("*.png"):
        write_png(path, np.random.default_rng(len(path.name)).integers(0, 256, (8, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"data is '.*moved', whose training images are not those of the run to resume"):
        Run(again, out, resume=True)

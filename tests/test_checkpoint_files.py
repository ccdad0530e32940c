"""Checkpoints by the names and files of other people's trainers, and whether they are whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mlflow_icr.integrations.checkpoint_files import (
    Kind,
    Position,
    UnfinishedError,
    entries_of,
    position_in_name,
    read_header,
)
from mlflow_icr.integrations.checkpoint_watch import LONG_AGO, Arrivals
from tests import trainer_files as files

LORA = {"lora_unet_x.lora_down.weight": torch.ones(2, 3), "lora_unet_x.lora_up.weight": torch.ones(3, 2)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fox-step00000500", Position(500)),  # kohya's sd-scripts, and what is derived from them
        ("fox-000003", Position(3, in_epochs=True)),
        ("epoch-000003", Position(3, in_epochs=True)),
        ("at-step00000500", Position(500)),
        ("fox_000000500", Position(500)),  # ai-toolkit
        ("fox_lora2024-05-05_12-00-00-save-500-3-20", Position(500)),  # OneTrainer
        ("2024-05-05_12-00-00-backup-500-3-20", Position(500)),
        ("checkpoint-500", Position(500)),  # diffusers
        ("checkpoint-100000", Position(100000)),
        ("000000131072", Position(131072)),  # the trainers here
        ("epoch=3-step=500", Position(500)),  # Lightning
        ("model_epoch_12", Position(12, in_epochs=True)),
        ("fox", None),
        ("fox-000003-state", None),  # of kohya's optimizer
    ],
)
def test_names_say_how_far_a_training_was(name: str, expected: Position | None) -> None:
    assert position_in_name(name) == expected


def test_each_trainers_folder_is_read(tmp_path: Path) -> None:
    save_file(LORA, tmp_path / "fox-000002.safetensors", files.kohya_metadata(40, 2))
    save_file(LORA, tmp_path / "fox-step00000025.safetensors")  # --no_metadata
    save_file(LORA, tmp_path / "fox.safetensors", files.kohya_metadata(60, 3))  # the last one
    (tmp_path / "fox-000002-state").mkdir()
    (tmp_path / "fox-000002-state" / "optimizer.bin").write_bytes(b"1")
    (tmp_path / "sample").mkdir()
    save_file(LORA, tmp_path / "fox_000000080.safetensors", files.toolkit_metadata(81))
    save_file({"x": torch.ones(1)}, tmp_path / "2024-save-90-4-10.safetensors")
    save_file(LORA, tmp_path / "other.safetensors")
    (tmp_path / "optimizer.pt").write_bytes(b"2")
    files.peft_adapter(tmp_path / "checkpoint-95", {"to_q": (torch.ones(2, 3), torch.ones(3, 2))}, 1.0)
    found = {entry.path.name: entry for entry in entries_of(tmp_path)}
    checkpoints = {name: entry.checkpoint for name, entry in found.items() if entry.checkpoint is not None}
    assert {name: (one.position.count, one.kind) for name, one in checkpoints.items()} == {
        "fox-000002.safetensors": (40, Kind.LORA),
        "fox-step00000025.safetensors": (25, Kind.LORA),
        "fox.safetensors": (60, Kind.LORA),
        "fox_000000080.safetensors": (81, Kind.LORA),  # what the file itself says
        "2024-save-90-4-10.safetensors": (90, Kind.FILE),
        "checkpoint-95": (95, Kind.PEFT),
    }
    assert checkpoints["fox.safetensors"].images_per_step == 4
    assert found.keys() - checkpoints.keys() == {"other.safetensors"}
    assert "neither its name nor its metadata" in found["other.safetensors"].reason


def test_half_written_files_are_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "fox-step00000001.safetensors"
    rest = files.half_written(path, LORA)
    whole = path.read_bytes() + rest
    for size in (0, 4, 8, 20, len(whole) - 1, len(whole) + 1):
        path.write_bytes((whole + b"0")[:size])
        with pytest.raises(UnfinishedError, match=path.name):
            read_header(path)
        (entry,) = entries_of(tmp_path)
        assert entry.checkpoint is None
        assert entry.unfinished
    path.write_bytes(whole)
    assert set(read_header(path).keys) == set(LORA)
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")  # no file of this kind, and nothing is read into memory for it
    with pytest.raises(UnfinishedError):
        read_header(path)


def test_a_folder_is_whole_with_its_config_and_all_shards(tmp_path: Path) -> None:
    unet = tmp_path / "checkpoint-7" / "unet"
    unet.mkdir(parents=True)

    def reason() -> str:
        (entry,) = entries_of(tmp_path)
        assert (entry.checkpoint is None) == bool(entry.reason)
        return entry.reason

    assert "no config.json" in reason()
    (unet / "config.json").write_text('{"_class_name": "UNet2DModel"')
    assert "no config.json that can be read" in reason()
    (unet / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    assert "no weights as safetensors" in reason()
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"1")
    assert "pickles, which are not read" in reason()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({"a": torch.ones(2)}, unet / names[0])
    assert "shards, and no index" in reason()
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    assert f"no {names[1]}" in reason()
    rest = files.half_written(unet / names[1], {"b": torch.ones(50)})
    assert "bytes" in reason() or "header" in reason()
    with (unet / names[1]).open("ab") as file:
        file.write(rest)
    assert reason() == ""
    adapter = tmp_path / "checkpoint-7"
    (adapter / "unet").rename(tmp_path / "elsewhere")
    save_file(LORA, adapter / "adapter_model.safetensors")
    (entry, *_) = entries_of(tmp_path)
    assert "both adapter_model.safetensors and adapter_config.json" in entry.reason


def test_a_checkpoint_is_taken_when_nobody_writes_any_more(tmp_path: Path) -> None:
    now = 100.0
    arrivals = Arrivals(tmp_path / "later", 5.0, lambda: now)
    assert arrivals.look() == []  # the trainer has not made its folder yet
    arrivals = Arrivals(tmp_path, 5.0, lambda: now)
    path = tmp_path / "fox-step00000001.safetensors"
    rest = files.half_written(path, LORA)
    assert arrivals.look() == []
    assert "fox-step00000001.safetensors" in arrivals.unsettled
    with path.open("ab") as file:
        file.write(rest)
    now += 4
    assert arrivals.look() == []
    now += 4.9
    assert arrivals.look() == []
    now += 0.1
    (found,) = arrivals.look()
    assert found.position == Position(1)
    save_file({**LORA, "lora_unet_y.lora_down.weight": torch.ones(2, 3)}, path)  # written once more
    assert arrivals.look() == []
    os.utime(path, (1e9, 1e9))
    assert LONG_AGO < 1000
    assert [one.path for one in Arrivals(tmp_path, 5.0, lambda: now).look()] == [path]  # written in 2001

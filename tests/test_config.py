"""Options: grouped in files, flat on the command line, and one line for what cannot be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from trainers import train
from trainers.command_line import config_changes, config_flags, train_parser
from trainers.config import GROUPS, OPTIONS, config_from, load_config, preset_names, read_values
from trainers.launch import check_launcher
from trainers.options import options_of


def test_every_option_has_one_flag_and_a_sentence() -> None:
    assert len(OPTIONS) == sum(len(options_of(kind)) for kind in GROUPS.values())
    shown = train_parser().format_help()
    for name, entry in OPTIONS.items():
        assert f"--{name.replace('_', '-')} " in shown
        assert len(entry.rules["text"]) > 5
    assert all(f"\n{group}:\n" in shown for group in GROUPS)
    assert "example:\n  python -m trainers.train" in shown


@pytest.mark.parametrize("preset", preset_names())
def test_files_and_flags_give_the_same_configuration(preset: str, tmp_path: Path) -> None:
    config = load_config(preset, {})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.grouped()))
    assert config_from(read_values(tmp_path / "config.yaml")) == config
    assert config_from(config.flat()) == config
    arguments = train_parser().parse_args([*config_flags(config), "--output-dir=x"])
    assert load_config(arguments.preset, config_changes(arguments)) == config


def test_flags_take_the_forms_that_people_type() -> None:
    given = ["--block_channels", "16,32", "--sigmas=0.1,1", "--labels", "--balanced=false", "--ema-rampup-ratio=null"]
    changes = config_changes(train_parser().parse_args([*given, "--companions=", "--total-kimg", "5", "--output-dir=x"]))
    assert changes == {
        "block_channels": (16, 32), "sigmas": (0.1, 1.0), "labels": True, "balanced": False, "ema_rampup_ratio": None,
        "companions": (), "total_kimg": 5.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {num_imges: 3}", "configuration key in data is 'num_imges'; did you mean num_images?"),
        ("optimizer: 3", "optimizer is 3; expected its keys below it: total_kimg, batch_size"),
        ("num_images: x", "num_images is 'x'; expected a whole number"),
        ("num_images: 3.5", "num_images is 3.5; expected a whole number"),
        ("labels: 1", "labels is 1; expected true or false"),
        ("network: {block_channels: [8, x]}", r"block_channels is [8, 'x']; expected whole numbers separated by commas"),
        ("learning_rate: .inf", "learning_rate is inf; expected a positive number"),
        ("ema_rampup_ratio: -1", "ema_rampup_ratio is -1.0; expected a positive number, or null"),
        ("- 1", "holds no configuration; expected groups such as data and network"),
        ("a: [", "which cannot be read: line 1: expected the node content"),
        ("data:\n\tnum_images: 3", "which cannot be read: line 2: found character '\\t' that cannot start any token"),
        ("num_images:", "num_images is None; expected a whole number"),
        ("seed: 99999999999999999999", "seed is 99999999999999999999; expected a whole number below 2^63"),
    ],
)
def test_what_a_file_cannot_say_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        config_from(load_config("digits", {}).flat() | read_values(tmp_path / "c.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "distributed_type is DEEPSPEED; expected one process, DDP"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "distributed_type is MEGATRON_LM; expected one process, DDP"),
        ({"ACCELERATE_USE_FSDP": "true"}, "distributed_type is FSDP 1; expected .* FSDP with fsdp_version 2"),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp8"},
            "mixed_precision is 'fp8', from accelerate's launcher; expected one of no, bf16",
        ),
    ],
)
def test_launchers_that_cannot_work_are_refused_in_one_line(
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train.main(["--preset=digits", f"--output-dir={tmp_path / 'run'}"]) == 2
    assert re.search(message, capsys.readouterr().err)
    check_launcher({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_MIXED_PRECISION": "bf16"})

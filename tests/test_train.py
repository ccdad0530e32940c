"""The trainer: bad input, a whole run, stopping, resuming, ranks."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from mlflow_icr import Report, cli, verdict
from mlflow_icr.monitoring.catalogue import metric_of
from mlflow_icr.tracking import read_history
from tests.servers import free_port
from tests.test_tracking import as_float32, journal_scalars, mlflow_scalars, tensorboard_scalars
from tests.training import SHORT, errors_of, measured, run_here
from trainers import train
from trainers.config import config_from, load_config, preset_names
from trainers.console import Console
from trainers.data import load_data
from trainers.families import family_of
from trainers.loop import TrainState


def tensorboard_texts(folder: Path) -> dict[str, str]:
    """The last text of every tag."""
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={TENSORS: 0})
    events.Reload()
    return {
        tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
        if tag.endswith("text_summary")
    }


def test_a_run_leaves_what_the_readme_says(whole: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    folder, store = whole
    rows = read_history(folder)
    assert [row["images_seen"] for row in rows] == [0, 320, 608, 1216]
    keys = {
        "repr/icr", "repr/icr_debiased", "repr/icr_low", "repr/icr_high", "repr/icr_rise", "repr/icr_rise_low",
        "repr/icr_rise_high", "loss/train_eval", "loss/heldout", "loss/gap",
        "repr/indefinite_fraction", "repr/trace_invariant", "repr/trace_residual",
        "repr/fisher_residual_energy", "repr/fisher_invariant_energy", "repr/fisher_residual_growth", "mem/ratio_l2",
        "gen/fd_pixels", "loss/train", "perf/images_per_second", "perf/measure_seconds", "perf/generate_seconds",
        "mem/ratio_l2_low", "mem/ratio_l2_high", "mem/authpct", "mem/authpct_low", "mem/authpct_high", "mem/ct",
        "gen/num_samples", "gen/vendi", "gen/fd_train_pixels", "gen/fd_gap_pixels", "gen/kid_pixels", "gen/kid_pixels_std",
        "gen/kid_train_pixels", "gen/kid_train_pixels_std", "gen/precision", "gen/recall", "gen/density", "gen/coverage",
        "gen/fld", "train/optimizer_steps", "train/batch_size",
    }  # fmt: skip
    errors = [f"{kind}_error_ratio" for kind in ("view", "near", "far", "heldout")]
    errors += ["view_auc", "view_excess", "heldout_auc"]
    for level in ("", "_x0.5", "_x2", "_x4"):
        names = [f"{key}{part}" for key in errors for part in ("", "_low", "_high")]
        keys |= {f"repr/{name}{level}" for name in (*names, "image_error")}
    keys |= {"repr/far_bias", "mem/path_distance", "mem/path_distance_q10"}
    keys |= {f"mem/ratio_l2_q{share}" for share in ("05", "25", "50")}
    rows[-1] = {key: value for key, value in rows[-1].items() if not key.startswith("mem/path_distance_sigma")}
    # C_T needs samples in the cells of held-out images, and is absent where there are none.
    assert set(rows[-1]) - {"mem/ct"} == (keys | {"images_seen"}) - {"mem/ct"}
    assert rows[-1]["loss/train"] < rows[1]["loss/train"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["num_images"] == 32

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    (info,) = MlflowClient().search_runs(["0"])
    assert info.info.status == "FINISHED"
    assert info.data.tags["study"] == "s1"
    assert info.info.run_id == json.loads((folder / "mlflow.json").read_text())["run_id"]
    assert re.fullmatch("[0-9a-f]{64}", info.data.params["data_sha256"])
    assert info.data.tags["icr.data_sha256"] == info.data.params["data_sha256"]
    assert info.data.tags["icr.torch"] == torch.__version__
    inputs = {entry.tags[0].value: entry.dataset for entry in info.inputs.dataset_inputs}
    for context, key, count in (("training", "data_sha256", 32), ("validation", "heldout_sha256", 197)):
        assert inputs[context].name == "digits"
        assert inputs[context].digest == info.data.params[key][:36]
        assert json.loads(inputs[context].profile) == {"num_images": count, "shape": [count, 1, 8, 8], "dtype": "uint8"}
    said = verdict(folder)
    assert info.data.tags["verdict"] == said.state
    assert info.data.tags["verdict.text"] == said.text
    assert info.data.metrics["checkpoint_images_seen"] == said.checkpoint_images_seen == 1216
    table = json.loads(Path(MlflowClient().download_artifacts(info.info.run_id, "tables/training_images.json")).read_text())
    with (folder / "tables" / "training_images.csv").open() as file:
        written = list(csv.DictReader(file))
    shares = [row[table["columns"].index("residual_share")] for row in table["data"]]
    assert shares == sorted(shares, reverse=True)
    assert shares == [float(row["residual_share"]) for row in written]
    assert len(shares) == 32
    assert "tables/training_images.json" in info.data.tags["mlflow.loggedArtifacts"]
    texts = tensorboard_texts(folder)
    assert texts["Answer/verdict/text_summary"] == said.text
    assert texts["tables/classes/text_summary"].startswith("| label | images | relative_share | influence |")
    for name in ("s", "xi"):
        vectors = np.loadtxt(folder / "projector" / "01216" / name / "tensors.tsv")
        assert vectors.shape == (32, 16)
        with Image.open(folder / "projector" / "01216" / name / "sprite.png") as sprite:
            assert sprite.size == (6 * 48, 6 * 48)
    assert {path.parent.name for path in folder.glob("images/*/000000001216.png")} == {
        "samples", "nearest", "distances", "neighbours_s", "neighbours_xi", "largest_residuals",
    }  # fmt: skip

    journal = journal_scalars(folder)
    stored, shown = mlflow_scalars(info.info.run_id), tensorboard_scalars(folder)
    assert {key: stored[key] for key in journal} == journal
    assert {key: shown[key] for key in journal} == as_float32(journal)
    assert info.data.metrics["icr_min"] == min(row["repr/icr"] for row in rows)


def test_every_key_of_a_run_is_in_the_catalogue(whole: tuple[Path, str]) -> None:
    keys = {key for row in read_history(whole[0]) for key in row} - {"images_seen"}
    assert len(keys) > 20
    assert not [key for key in sorted(keys) if metric_of(key) is None]


@pytest.mark.slow
def test_samples_are_judged_on_a_schedule_of_their_own(whole: tuple[Path, str], tmp_path: Path) -> None:
    assert run_here(tmp_path / "run", "--generate-every=3").returncode == 0
    rows, others = measured(tmp_path / "run"), measured(whole[0])
    assert [row["images_seen"] for row in rows if "mem/ratio_l2" in row] == [0, 1216]
    assert [row["images_seen"] for row in read_history(tmp_path / "run") if "perf/generate_seconds" in row] == [0, 1216]
    for row, other in zip(rows, others, strict=True):
        assert row.items() <= other.items()  # and nothing else is changed by it


def test_plain_diffusers_samples_a_checkpoint(whole: tuple[Path, str]) -> None:
    """Without this package's code: `test_families.py` does it in a process that cannot import any."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(whole[0] / "checkpoints" / "000000001216")
    pipeline.set_progress_bar_config(disable=True)
    x = pipeline(batch_size=2, num_inference_steps=18, generator=torch.manual_seed(0), output_type="np").images
    assert type(pipeline).__name__ == "ConsistencyModelPipeline"
    assert x.shape == (2, 8, 8, 1)
    assert 0 <= x.min() < x.max() <= 1
    assert not [path for path in whole[0].rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]


def test_the_command_line_measures_a_checkpoint_as_the_run_did(
    whole: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load_data("digits", resolution=8, num_images=32, num_heldout=197, seed=0)
    for i, image in enumerate(data.train):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i:03d}.png")
    checkpoint = str(whole[0] / "checkpoints" / "000000001216")
    with errors_of():
        assert cli.main(["measure", checkpoint, "--data", str(tmp_path), "--num-views", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["repr/icr"] == pytest.approx(read_history(whole[0])[-1]["repr/icr"], rel=1e-4)
    assert cli.main(["measure", str(tmp_path), "--data", str(tmp_path)]) == 2
    assert "expected a diffusers folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGUSR1))]
)
def test_a_stopped_run_goes_on_as_if_it_had_not(
    whole: tuple[Path, str], tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from trainers.run import Run

    step = Run._step

    def then_signal(self: Run, steps: Iterator[TrainState]) -> None:
        step(self, steps)
        if self.state.optimizer_steps == 15:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", then_signal)
        stopped = run_here(tmp_path)
    assert stopped.returncode == 128 + number, stopped.stderr
    client = MlflowClient()
    run_id = json.loads((tmp_path / "mlflow.json").read_text())["run_id"]
    assert client.get_run(run_id).info.status == "KILLED"
    assert len(measured(tmp_path)) == 2
    assert max(path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")) == "000000000480"

    done = run_here(tmp_path, "--resume")
    assert done.returncode == 0, done.stderr
    assert measured(tmp_path) == measured(whole[0])
    assert client.get_run(run_id).info.status == "FINISHED"
    assert len(client.search_runs(["0"])) == 1
    a, b = (load_file(folder / "checkpoints/000000001216/state.safetensors") for folder in (whole[0], tmp_path))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    journal, shown = journal_scalars(tmp_path), tensorboard_scalars(tmp_path)
    assert {key: shown[key] for key in journal} == as_float32(journal)
    stored = mlflow_scalars(run_id)
    assert {key: stored[key] for key in journal} == journal


def test_two_ranks_train_one_run(whole: tuple[Path, str], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        f"--main_process_port={free_port()}",
        "-m",
    ]
    # The beginning of the other run, to its first measurement after some steps.
    flags = [*SHORT, "--total-kimg=0.3", "--measurements=2", f"--output-dir={tmp_path}"]
    command = [sys.executable, *launch, "trainers.train", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert len(MlflowClient().search_runs(["0"])) == 1
    assert MlflowClient().search_runs(["0"])[0].data.params["world_size"] == "2"
    one, two = measured(whole[0])[:2], measured(tmp_path)
    assert [row["images_seen"] for row in two] == [0, 320]
    for a, b in zip(one, two, strict=True):
        # The same images, noise and views; gradients are summed in another order, in float32, over 10 steps.
        for key in ("loss/train", "repr/icr", "repr/trace_residual"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=2e-3), (key, a["images_seen"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset=digit"], r"preset is 'digit'; did you mean digits\?; expected one of cifar10-4096, cifar10-50k"),
        ([], r"preset is not given; expected one of cifar10-4096, cifar10-50k, digits"),
        (["--preset=digits", "--learning-rat=1"], r"flag is 'learning-rat'; did you mean learning-rate\?"),
        (["--preset=digits", "--num-images=ten"], "num_images is 'ten'; expected a whole number"),
        (["--preset=digits", "--num-images=1700"], "num_images is 1700 and num_heldout 197; expected at most 1797 together"),
        (["--preset=digits", "--num-images=1"], "num_images is 1; expected a whole number >= 2"),
        (["--preset=digits", "--total-kimg=0"], "total_kimg is 0.0; expected a positive number"),
        (["--preset=digits", "--total-kimg=1"], "first_measurement_kimg is 2.0; expected at most total_kimg, 1"),
        (["--preset=digits", "--mixed-precision=fp8"], "mixed_precision is 'fp8'; expected one of no, bf16, fp16"),
        (["--preset=digits", "--mixed-precision=fp16"], "mixed_precision is .fp16.; expected no or bf16 where"),
        (["--preset=digits", "--gradient-accumulation-steps=7"], "batch_size is 48; expected a multiple of .*, 7"),
        (["--preset=digits", "--resolution=9"], "resolution is 9; expected a multiple of 2 for 2 blocks"),
        (["--preset=digits", "--block-channels=30"], "block_channels is .30,.; expected positive multiples of 8"),
        (["--preset=digits", "--attention-resolutions=5"], "attention_resolutions is .5,.; expected some of 8, 4"),
        (["--preset=digits", "--augmentation-level=9"], "augmentation_level is 9; expected one of 1, 2, 3, 4, 5"),
        (["--preset=digits", "--probe-views=1"], "probe_views is 1; expected a whole number >= 2"),
        (["--preset=digits", "--layer=up_block.0"], r"layer is 'up_block.0'.*did you mean up_blocks.0"),
        (["--preset=digits", "--data=/nonexistent"], "data is '/nonexistent', which is not there; expected a folder, a .zip"),
        (["--preset=digits", "--tag=study"], "tag is 'study'; expected KEY=VALUE"),
        (["--preset=digits", "--resume"], "holds no config.yaml; --resume expects the folder of a run"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)  # the test runner keeps its own
    output_dir = tmp_path / "run"
    try:
        status = train.main([*flags, f"--output-dir={output_dir}"])
    except SystemExit as error:
        status = error.code  # type: ignore[assignment]
    assert status == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not output_dir.exists()


def test_a_taken_folder_and_a_different_resumption_are_refused(
    whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*SHORT, f"--output-dir={whole[0]}"]) == 2
    assert "which holds a run; expected a new folder, or --resume" in capsys.readouterr().err
    assert train.main([*SHORT, f"--output-dir={whole[0]}", "--resume", "--seed=3"]) == 2
    assert "seed is 3, but the run to resume has 0; expected the same" in capsys.readouterr().err


def test_a_damaged_history_is_not_resumed(whole: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text((whole[0] / "config.yaml").read_text())
    (tmp_path / "history.jsonl").write_text("nonsense\n" + (whole[0] / "history.jsonl").read_text())
    assert train.main([f"--output-dir={tmp_path}", "--resume"]) == 2
    assert re.search("error: .*history.jsonl, line 1: not a measurement", capsys.readouterr().err)


def test_unknown_keys_in_a_configuration_are_refused(
    whole: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load((whole[0] / "config.yaml").read_text()) | {"learning_rte": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert train.main([f"--output-dir={tmp_path}", "--resume"]) == 2
    assert "configuration key is 'learning_rte'; did you mean learning_rate?" in capsys.readouterr().err


def test_presets_are_whole_and_the_papers_is_the_papers() -> None:
    for name in preset_names():
        config = load_config(name, {})
        assert config.protocol().layer == "decoder"
        assert config_from(config.grouped()) == config_from(config.flat()) == config
    paper = load_config("cifar10-4096", {})
    assert (paper.data.num_images, paper.protocol().num_images, paper.protocol().num_views) == (4096, 4096, 2)
    assert (
        paper.noise.p_mean,
        paper.noise.p_std,
        paper.noise.sigma_data,
        paper.optimizer.batch_size,
        paper.optimizer.total_kimg,
    ) == (-1.2, 1.2, 0.5, 512, 200_000)
    with torch.device("meta"):
        network = family_of(paper).build(3, 32)
    assert 40e6 < sum(p.numel() for p in network.parameters()) < 80e6  # DDPM++ has 56M (Karras et al. 2022, appendix F)


def test_trackers_are_told_of_the_end_when_the_disk_takes_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    from trainers.run import Run

    def full(self: Run, tracker: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "conclude", full)
    with errors_of():
        assert run_here(tmp_path / "run", "--total-kimg=0.3", "--measurements=2").returncode == 1
    (run,) = MlflowClient().search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["icr_min"] > 0


def test_a_long_training_says_how_long_it_takes_where_there_is_no_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("trainers.console.time.monotonic", lambda: now[0])

    def told(seconds_a_step: float, total_kimg: int) -> str:
        console = Console(load_config("digits", {"total_kimg": total_kimg, "batch_size": 10}), shown=True)
        for step in range(1, 101):
            now[0] += seconds_a_step
            console.step(SimpleNamespace(images_seen=10 * step))  # type: ignore[arg-type]
            if step == 50:  # what a measurement takes does not count
                now[0] += 1000
                console.measured(Report(500, {}))
        return capsys.readouterr().out

    assert told(2.0, 1000).splitlines()[0].startswith("5 images/s: the 1,000 kimg of total_kimg take 56 h more")
    assert "take" not in told(2.0, 10)  # it takes half an hour
    assert "take" not in told(0.01, 1000)  # no minute has passed

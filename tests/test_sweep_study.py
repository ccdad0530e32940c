"""Sweeps: what a grid means, what is refused, and a study that goes on where it was left."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mlflow_icr import summarise, verdict
from mlflow_icr.tracking import read_history
from trainers.command_line import config_changes, config_flags, train_parser
from trainers.config import load_config
from trainers.experiments.sweep import command as sweep
from trainers.experiments.sweep.grid import expand, values_of
from trainers.experiments.sweep.plan import plan
from trainers.experiments.sweep.results import result_row, sweep_figure, table_text

ROOT = Path(__file__).parents[1]
SHORT = {
    "first_measurement_kimg": "0.3", "measurements": "2", "block_channels": "16,32", "num_samples": "8", "sample_steps": "2",
    "total_kimg": "0.6", "probe_views": "4",
}  # fmt: skip


def flags(**values: str) -> list[str]:
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.fixture
def _signals() -> Iterator[None]:
    """A sweep in this process leaves its handlers."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_grid_is_every_combination_seeds_fastest() -> None:
    runs = expand("digits", {"num_images": "64,128", "batch_size": "16,32", "seed": "0:2"})
    assert [run.name for run in runs] == [
        "n64-seed0-batch_size_16", "n64-seed1-batch_size_16", "n64-seed0-batch_size_32", "n64-seed1-batch_size_32",
        "n128-seed0-batch_size_16", "n128-seed1-batch_size_16", "n128-seed0-batch_size_32", "n128-seed1-batch_size_32",
    ]  # fmt: skip
    last = runs[-1].config
    assert (last.data.num_images, last.run.seed, last.optimizer.batch_size) == (128, 1, 32)
    assert last == load_config("digits", {"num_images": 128, "seed": 1, "batch_size": 32})
    assert [run.name for run in expand("digits,mnist5k", {})] == ["digits-n128-seed0", "mnist5k-n256-seed0"]


def test_values_of_every_kind() -> None:
    assert values_of("seed", "0:3,7,10:31:10") == [0, 1, 2, 7, 10, 20, 30]
    assert values_of("learning_rate", "1e-3,2e-3") == [0.001, 0.002]
    assert values_of("block_channels", "16,32;32,64") == [(16, 32), (32, 64)]
    assert values_of("companions", "") == [()]
    assert values_of("stop_on", "") == [""]
    assert values_of("measure_raw", "true,false") == [True, False]
    assert values_of("layer", "mid,decoder") == ["mid", "decoder"]
    assert values_of("data", "one,and,a,path;digits") == ["one,and,a,path", "digits"]


def test_flags_of_a_configuration_make_it_again() -> None:
    config = load_config(
        "digits", {"companions": ("rankme",), "measure_raw": True, "learning_rate": 1.1e-3, "stop_on": "turning"}
    )
    arguments = train_parser().parse_args([*config_flags(config), "--output-dir=x"])
    assert load_config(arguments.preset, config_changes(arguments)) == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--num-images="], "num_images is '', where a value is empty"),
        (["--num-images=64,,128"], "num_images is '64,,128', where a value is empty"),
        (["--num-images=64,128,64"], "num_images is '64,128,64', which names 64 twice"),
        (["--learning-rate=1e-3,0.001"], "learning_rate is '1e-3,0.001', which names 0.001 twice"),
        (["--batch-size=16,many"], "batch_size is 'many'; expected a whole number"),
        (["--seeds=5:0"], "seeds is '5:0'; expected ranges like 0:5"),
        (["--seeds=0:x"], "seeds is '0:x'; expected ranges like 0:5"),
        (["--seeds=0:9:0"], "seeds is '0:9:0'; expected ranges"),
        (["--seeds=0:999999999999"], "seeds is '0:999999999999', which is over 10000 values"),
        (["--seeds=0:200", "--batch-size=1:101"], "the grid has 20000 runs; expected at most 10000"),
        (["--seed=1", "--seeds=2"], "seed is '1' and seeds '2'; expected one of them"),
        (["--seeds=-1"], "seed is -1; expected a whole number >= 0"),
        (["--num-images=64,2000"], "num_images is 2000 and num_heldout 197; expected at most 1797"),
        (["--num-images=64,1"], "num_images is 1; expected a whole number >= 2"),
        (["--block-channels=16,32;16,33"], "block_channels is"),
        (["--preset=digits,nothing"], "preset is 'nothing'; expected one of"),
        (["--launcher=cloud"], "launcher is 'cloud'; expected one of local, slurm"),
        (["--max-parallel=0"], "max_parallel is '0'; expected a whole number >= 1"),
        (["--partition=gpu"], "partition is 'gpu', which is for Slurm, but launcher is 'local'"),
        (["--launcher=slurm", "--time=soon"], "time is 'soon'; expected minutes"),
        (["--launcher=slurm", "--nodes=two"], "nodes is 'two'; expected a whole number"),
        (["--launcher=slurm", "--tasks-per-node=5"], "batch_size is 48; expected a multiple of 5, the ranks times"),
        (["--launcher=slurm", "--slurm-options=x"], "slurm_options is 'x'; expected NAME=VALUE"),
        (["--launcher=slurm"], "launcher is 'slurm', "),
        (["--num-image=5"], "flag is 'num-image'; did you mean num-images?"),
    ],
)
def test_impossible_sweeps_are_one_line_before_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: list[str], message: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no cluster
    try:
        status = sweep.main([*given, f"--output-dir={tmp_path / 'study'}"])
    except SystemExit as error:
        status = error.code  # type: ignore[assignment]
    assert status == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("sweep: error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_a_dry_run_says_what_would_be_run_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--num-images=32,64", "--seeds=0:2", "--total-kimg=5", "--dry-run"]
    assert sweep.main([*given, f"--output-dir={tmp_path / 'study'}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"4 runs: num_images 32, 64 x seed 0, 1; 2 at a time, on this machine; in {tmp_path / 'study'}"
    assert said[1] == "  n32-seed0  new  (digits, 32 images, seed 0, 5 thousand images seen)"
    assert len(said) == 5
    assert not list(tmp_path.iterdir())
    # Without a folder's name, the same command finds its folder again, another one has another.
    monkeypatch.chdir(tmp_path)
    assert plan(given).folder == plan(given).folder
    assert plan(given).folder != plan([*given, "--batch-size=16"]).folder
    # All are measured on as many images as the smallest run has, so that their values compare.
    assert {run.config.monitor.probe_images for run in plan(given).runs} == {32}
    (tmp_path / "mine.txt").write_text("mine")
    assert sweep.main([*given, f"--output-dir={tmp_path}"]) == 2
    assert "which holds something else; expected a new folder, or that of a sweep" in capsys.readouterr().err


@pytest.mark.usefixtures("_signals")
@pytest.mark.slow
def test_a_failure_is_told_alone_and_the_same_command_goes_on_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    study = tmp_path / "study"
    values = {"num_images": "32,48", "seeds": "3", "output_dir": str(study), **SHORT}
    # What the plan does not look for: a run to go on with has a damaged history.
    broken = study / "runs" / "n48-seed3"
    broken.mkdir(parents=True)
    config = plan(flags(**values | {"output_dir": str(tmp_path / "other")})).runs[1].config
    (broken / "config.yaml").write_text(yaml.safe_dump(config.flat()))
    (broken / "history.jsonl").write_text("nothing\n")
    (study / "study.json").write_text(json.dumps({"study": "a study"}))
    assert sweep.main(flags(**values)) == 1
    said = capsys.readouterr()
    assert "2 runs: num_images 32, 48; 2 at a time, on this machine" in said.out
    failure = rf"n48-seed3 failed: trainers.train: error: {broken}/history.jsonl, line 1: .*; its log: {study}/logs/n48-seed3"
    assert re.search(failure, said.out)
    assert re.search(failure, said.err)
    assert "FAILED: 1 of 2 runs are finished; the same command continues with the others" in said.err
    client = MlflowClient()
    runs = {run.data.tags["role"]: run for run in client.search_runs(["0"])}
    assert set(runs) == {"study", "run"}
    assert runs["run"].info.status == "FINISHED"
    assert runs["run"].data.tags["study"] == runs["study"].data.tags["study_name"] == "a study"
    assert runs["study"].info.status == "FAILED"
    assert runs["study"].data.metrics["runs_failed"] == 1
    assert re.search(failure, runs["study"].data.tags["mlflow.note.content"])
    history = (study / "runs" / "n32-seed3" / "history.jsonl").read_text()

    # As `mlflow run` now, which makes a run of its own: the study goes on in the first one.
    shutil.rmtree(broken)
    parameters = [part for key, value in values.items() for part in ("-P", f"{key}={value}")]
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", "sweep", "--env-manager", "local", *parameters],
        cwd=ROOT, env=os.environ | path, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"n32-seed3 +finished", done.stdout)
    assert "[2/2] n48-seed3 finished: " in done.stdout
    assert (study / "runs" / "n32-seed3" / "history.jsonl").read_text() == history
    found = client.search_runs(["0"])
    again = next(run for run in found if run.info.run_id == runs["study"].info.run_id)
    assert again.info.status == "FINISHED"
    assert [run.data.tags.get("role") for run in found].count("run") == 2
    (other,) = [run for run in found if "role" not in run.data.tags]
    assert f"whose results are in run {again.info.run_id}" in other.data.tags["mlflow.note.content"]
    check_results(study, again.info.run_id)

    # Finished runs stay as they are; other values do not fit in.
    capsys.readouterr()
    assert sweep.main(flags(**values | {"batch_size": "32"})) == 2
    assert f"batch_size is 32, but {study}/runs/n32-seed3 has a run with 48; expected the same" in capsys.readouterr().err


def check_results(study: Path, run_id: str) -> None:
    """Table, figure and MLflow's table say what the runs' own folders say."""
    from mlflow import MlflowClient

    with (study / "sweep.csv").open() as file:
        table = {row["run"]: row for row in csv.DictReader(file)}
    assert list(table) == ["n32-seed3", "n48-seed3"]
    shown = json.loads(Path(MlflowClient().download_artifacts(run_id, "tables/sweep.json")).read_text())
    for name, row in table.items():
        history = read_history(study / "runs" / name)
        assert row["status"] == "finished"
        assert row["verdict"] == verdict(history).state
        assert float(row["icr_min"]) == summarise(history)["icr_min"]
        assert int(float(row["images_seen"])) == history[-1]["images_seen"]
        (line,) = [line for line in shown["data"] if line[0] == name]
        assert dict(zip(shown["columns"], line, strict=True))["icr_min"] == float(row["icr_min"])
    assert table["n32-seed3"]["num_images"] == "32"
    assert {file.path for file in MlflowClient().list_artifacts(run_id)} >= {"sweep.csv", "sweep.json", "sweep.png"}
    assert (study / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_ctrl_c_ends_all_runs_and_leaves_them_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow import MlflowClient

    study = tmp_path / "study"
    given = flags(**SHORT | {"num_images": "32", "seeds": "0:3", "total_kimg": "400", "output_dir": str(study)})
    child = subprocess.Popen(
        [sys.executable, "-m", "trainers.experiments.sweep", *given],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while len(list(study.glob("runs/*/checkpoints/[0-9]*/state.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sweep.main(given) == 2
    assert "where a sweep, or a run that one left behind, is at work" in capsys.readouterr().err
    os.killpg(child.pid, signal.SIGINT)
    output, _ = child.communicate(timeout=200)
    assert child.returncode == 128 + signal.SIGINT, output
    assert "KILLED: 0 of 3 runs are finished; the same command continues with the others" in output
    status = sorted((run.data.tags["role"], run.info.status) for run in MlflowClient().search_runs(["0"]))
    assert status == [("run", "KILLED"), ("run", "KILLED"), ("study", "KILLED")]
    assert sweep.main([*given, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"n32-seed[01] +goes on from [\d,]+ images seen on", said)) == 2
    assert re.search(r"n32-seed2 +new", said)


def history(folder: Path, turn: int | None, onset: int | None) -> None:
    """A run whose view error ratio turns, and whose samples are copies, from where it is told."""
    folder.mkdir(parents=True)
    rows = []
    for step in (0, *(round(1000 * 2 ** (i / 4)) for i in range(29))):
        ratio = 1.0 if step == 0 else 2.5 * (max(1.0, step / turn) ** 1.5 if turn else 1.0)
        rows.append({
            "images_seen": step, "repr/icr": 0.7, "repr/view_error_ratio": ratio,
            "repr/view_error_ratio_low": 0.99 * ratio, "repr/view_error_ratio_high": 1.01 * ratio,
            "mem/ratio_l2": 0.4 if onset and step >= onset else 0.0,
        })  # fmt: skip
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_figure_shows_turns_copies_and_those_that_did_not_turn(tmp_path: Path) -> None:
    runs = expand("digits", {"num_images": "64,128", "seed": "0:2"})
    for run, turn in zip(runs, (4000, 8000, 16000, None), strict=True):
        history(tmp_path / run.name, turn, turn and 8 * turn)
    rows = [result_row(run, ["num_images", "seed"], tmp_path / run.name, "FINISHED") for run in runs]
    for run, row in zip(runs, rows, strict=True):
        said = verdict(tmp_path / run.name)
        assert row["turned_at_images_seen"] == said.turned_at
        assert row["verdict"] == said.state
    assert rows[3]["turned_at_images_seen"] is None
    assert [row["mem_onset_images_seen"] for row in rows] == [32000, 64000, 128000, None]
    assert rows[0]["lead_images"] == summarise(read_history(tmp_path / runs[0].name))["lead_images"]

    (axes,) = sweep_figure(rows, ["num_images", "seed"], "a title").axes
    lines = {line.get_label(): line for line in axes.lines}
    turned = lines["turned (median, each with its bounds)"]
    both = [row["turned_at_images_seen"] for row in rows[:2]]
    assert list(turned.get_xdata()) == [64, 128]
    assert list(turned.get_ydata()) == [sum(both) / 2, rows[2]["turned_at_images_seen"]]
    assert list(lines["copies begin (median)"].get_ydata()) == [48000, 128000]
    triangles = [list(line.get_ydata()) for line in axes.lines if line.get_marker() == "^" and len(line.get_xdata())]
    assert triangles == [[128000]]  # what it has seen
    assert axes.get_xlabel() == "training images"

    text = table_text(rows, ["num_images", "seed"]).splitlines()
    assert len({len(line) for line in text}) == 1
    assert re.search(r"\| +128 \| +1 \| finished \| generalizing \| +- \| +- \|", text[-1])

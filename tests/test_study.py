"""The experiment: what it plans, runs, draws and prints."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mlflow_icr.tracking import read_history
from tests import programs
from trainers.experiments import demo as experiment
from trainers.experiments.address import chart_address, without_secrets
from trainers.experiments.figure import study_figure

ROOT = Path(__file__).parents[1]
SHORT = [
    "-P", "num_images=32", "-P", "first_measurement_kimg=0.3", "-P", "measurements=2", "-P", "block_channels=16,32",
    "-P", "num_samples=72", "-P", "sample_steps=4",
]  # fmt: skip


def mlflow_run(*flags: str) -> programs.Program:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["-m", "mlflow", "run", str(ROOT), "--env-manager", "local", *SHORT, *flags]
    return programs.start(command, env=environment, cwd=ROOT, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_mlflow_run_makes_two_siblings_and_a_study(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    child = mlflow_run(
        "-P", f"output_dir={tmp_path / 'study'}", "-P", "seed=4", "-P", "control_images=64", "-P", "total_kimg=0.6"
    )
    done = child.wait(400)
    output = done.stdout
    assert done.returncode == 0, output
    client = MlflowClient()
    runs = {run.data.tags.get("role"): run for run in client.search_runs(["0"])}
    assert set(runs) == {"study", "limited", "control"}
    assert all(run.info.status == "FINISHED" for run in runs.values())
    assert runs["limited"].data.tags["study"] == runs["control"].data.tags["study"] == runs["study"].data.tags["study_name"]
    assert "study" not in runs["study"].data.tags  # it has no curves, and stays out of the siblings' chart

    # The same images and views in both: the first measurement, before any training, is the same to the last bit.
    histories = {role: read_history(tmp_path / "study" / role) for role in ("limited", "control")}
    assert histories["limited"][0]["repr/icr"] == histories["control"][0]["repr/icr"]
    digests = {role: runs[role].data.params["protocol_digest"] for role in histories}
    assert digests["limited"] == digests["control"]
    assert runs["limited"].data.params["num_images"] == "32"
    assert runs["control"].data.params["num_images"] == "64"
    assert runs["limited"].data.params["seed"] == "4"
    assert runs["limited"].data.params["data_sha256"] != runs["control"].data.params["data_sha256"]

    study = runs["study"]
    assert {f.path for f in client.list_artifacts(study.info.run_id)} >= {"study.png", "study.csv", "report"}
    for run, folder in ((study, "study"), (runs["limited"], "study/limited")):
        [page] = client.list_artifacts(run.info.run_id, "report")
        assert page.file_size == (tmp_path / folder / "report" / "index.html").stat().st_size
    for role, rows in histories.items():
        assert study.data.metrics[f"{role}/icr_min"] == min(row["repr/icr"] for row in rows)
        assert study.data.metrics[f"{role}/icr_end"] == rows[-1]["repr/icr"]
    with (tmp_path / "study" / "study.csv").open() as file:
        table = {row["run"]: row for row in csv.DictReader(file)}
    assert float(table["control"]["icr_end"]) == histories["control"][-1]["repr/icr"]
    address = re.search(r"MLflow +(http://127.0.0.1:5000/#/experiments/0/runs\S+)", output)
    assert address
    assert address.group(1) in study.data.tags["mlflow.note.content"]
    assert "tensorboard --logdir" in output


def test_a_failing_sibling_ends_the_study_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(ROOT)
    study = experiment.plan(["--num-images=32", "--control-images=64", "--total-kimg=400", f"--output-dir={tmp_path / 'new'}"])
    # What the plan cannot foresee: the folder is taken by the time that the control starts.
    (study.folder / "control").mkdir(parents=True)
    (study.folder / "control" / "config.yaml").write_text("{}")
    code = (
        "import sys, dataclasses; from pathlib import Path;"
        "from trainers.experiments import demo as g;"
        "from trainers.train import Stop; real = g.plan(sys.argv[1:-1]);"
        "sys.exit(g.run_study(dataclasses.replace(real, folder=Path(sys.argv[-1])), Stop()))"
    )
    flags = ["--num-images=32", "--control-images=64", "--total-kimg=400", "--block-channels=16,32", "--num-samples=16"]
    flags += [f"--output-dir={tmp_path / 'other'}", str(study.folder)]
    done = programs.run(["-c", code, *flags], timeout=300)
    assert done.returncode == 1
    assert "[control] trainers.train: error: data is not given" in done.stdout  # what the folder has is no configuration
    assert "FAILED: not all runs came to their end" in done.stderr
    status = {run.data.tags["role"]: run.info.status for run in MlflowClient().search_runs(["0"])}
    assert status["study"] == "FAILED"
    assert status.get("limited", "KILLED") == "KILLED"  # asked to stop, maybe before it had a run


@pytest.mark.slow
def test_a_stopped_study_stops_its_runs(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    command = [
        sys.executable,
        "-m",
        "trainers.experiments.demo",
        "--num-images=32",
        "--total-kimg=400",
    ]
    child = subprocess.Popen(
        [*command, f"--output-dir={tmp_path / 'study'}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 200
    while len(list(tmp_path.glob("study/*/history.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 128 + signal.SIGTERM, output
    status = {run.data.tags["role"]: run.info.status for run in MlflowClient().search_runs(["0"])}
    assert status == {"study": "KILLED", "limited": "KILLED", "control": "KILLED"}
    assert all(list(tmp_path.glob(f"study/{role}/checkpoints/[0-9]*/state.safetensors")) for role in ("limited", "control"))


def test_ctrl_c_under_mlflow_run_leaves_a_checkpoint_and_an_ended_run(tmp_path: Path) -> None:
    """The terminal sends SIGINT to the whole group, and MLflow sends SIGTERM after it: together one wish to stop."""
    from mlflow import MlflowClient

    child = mlflow_run("-e", "train", "-P", f"output_dir={tmp_path / 'run'}", "-P", "total_kimg=400")
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "history.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    child.kill(signal.SIGINT)
    output = child.wait(120).stdout
    (run,) = MlflowClient().search_runs(["0"])
    assert "killed: lowest ICR" in output
    assert run.info.status == "FAILED"  # ours was KILLED; `mlflow run`, interrupted, has the last word on the run it made
    assert run.data.params["total_kimg"] == "400"  # as the command line says it, not as 400.0
    assert list(tmp_path.glob("run/checkpoints/[0-9]*/state.safetensors"))


def test_a_study_that_breaks_is_not_called_finished(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    code = (
        "import sys; from trainers.experiments import demo as g;"
        "from trainers.train import Stop; g.run_siblings = lambda *_: 1 / 0;"
        "g.run_study(g.plan(sys.argv[1:]), Stop())"
    )
    done = programs.run(["-c", code, f"--output-dir={tmp_path / 's'}"], cwd=ROOT)
    assert "ZeroDivisionError" in done.stderr
    (run,) = MlflowClient().search_runs(["0"])
    assert run.info.status == "FAILED"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--control-images=100"], "control_images is 100 and num_images 128; expected num_images < control_images <= 1600"),
        (["--control-images=2000"], "control_images is 2000"),
        (["--control-images=many"], "control_images is 'many'; expected a whole number"),
        (["--preset=nothing"], "preset is 'nothing'; expected one of"),
        (["--num-images=1650"], "control_images is 1600 and num_images 1650"),
        (["--max-parallel=0"], "max_parallel is '0'"),
        (["--learning_rate=fast"], "learning_rate is 'fast'; expected a number"),
        (["--num-image=5"], r"flag is 'num-image'; did you mean num-images\?"),
    ],
)
def test_impossible_studies_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    try:
        status = experiment.main([*flags, f"--output-dir={tmp_path / 'study'}"])
    except SystemExit as error:
        status = error.code  # type: ignore[assignment]
    assert status == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "study").exists()


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert experiment.main([f"--output-dir={tmp_path}"]) == 2
    assert "which is not empty; expected a new folder" in capsys.readouterr().err


def test_the_figure_shows_each_run_its_turn_and_its_intervals() -> None:
    steps = [0, *(1000 * 2**i for i in range(8))]
    icrs = [0.9, 0.85, 0.8, 0.75, 0.7, 0.72, 0.75, 0.78, 0.8]
    limited = [
        {
            "images_seen": s, "repr/icr_debiased": i, "repr/icr_low": i - 0.01, "repr/icr_high": i + 0.01,
            "repr/icr_rise_low": i - 0.71, "mem/ratio_l2": 0.0 if s < 100_000 else 0.3, "repr/fisher_residual_energy": 1e-5 * i,
        }
        for s, i in zip(steps, icrs, strict=True)
    ]  # fmt: skip
    control = [{"images_seen": s, "repr/icr_debiased": 0.7, "mem/ratio_l2": 0.0} for s in steps]
    figure = study_figure({"limited: 8 images": limited, "control: 64 images": control}, "a title")
    icr_panel, ratio, copies, energy = figure.axes
    assert icr_panel.get_title() == "a title"
    legend = [text.get_text() for text in icr_panel.get_legend().get_texts()]
    assert legend == ["limited: 8 images: turning", "control: 64 images: undecided"]  # ICR alone acquits nobody
    curves = [line for line in icr_panel.lines if len(line.get_xdata()) > 2]
    assert [list(line.get_ydata()) for line in curves] == [icrs[1:], [0.7] * 8]
    assert list(curves[0].get_xdata()) == [s / 1000 for s in steps[1:]]
    (band,) = icr_panel.collections
    assert band.get_paths()[0].get_extents().y0 == pytest.approx(0.69)
    assert "8 kimg" in ratio.texts[0].get_text()  # the lowest ICR
    assert "128 kimg" in copies.texts[0].get_text()
    assert len([line for line in energy.lines if len(line.get_xdata()) > 2]) == 1  # the control has none, and gets no line


def test_addresses_open_the_chart_and_hold_no_secret() -> None:
    address = chart_address("https://user:hunter2@tracking.example.org:8443/base?token=x", "7", "a study")
    assert address.startswith("https://tracking.example.org:8443/base/#/experiments/7/runs?")
    assert "hunter2" not in address
    assert "token" not in address
    assert "workflowType=machine_learning&compareRunsMode=CHART" in address
    assert "tags.study%20%3D%20%27a%20study%27" in address
    assert chart_address("sqlite:///mlflow.db", "0", "s").startswith("http://127.0.0.1:5000/#/experiments/0/")
    assert without_secrets("postgresql://me:pw@db/mlflow") == "postgresql://db/mlflow"
    assert without_secrets("sqlite:///mlflow.db") == "sqlite:///mlflow.db"


def test_the_project_file_names_the_entry_points() -> None:
    project = yaml.safe_load((ROOT / "MLproject").read_text())
    assert project["entry_points"]["main"] == project["entry_points"]["generalization_to_memorization"]
    assert {"main", "train", "sweep", "noise_window", "measure"} <= set(project["entry_points"])


@pytest.mark.slow
def test_the_noise_window_sweeps_what_the_study_left(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    command = [
        sys.executable, "-m", "trainers.experiments.noise_window", "--preset=digits", "--num-images=32", "--control-images=64",
        "--total-kimg=0.6", "--first-measurement-kimg=0.3", "--measurements=2", "--block-channels=16,32", "--num-samples=8",
        "--sample-steps=2", f"--output-dir={tmp_path / 'study'}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "study" / "noise_window.csv").open() as file:
        rows = list(csv.DictReader(file))
    models = {row["model"] for row in rows}
    assert models == {"control, at the end (624)", "limited, at the end (624)"}  # there was no turn yet
    assert len(rows) == 2 * 9 * 5  # models, sigmas, blocks of the network
    for name in models:
        mine = [row for row in rows if row["model"] == name and row["layer"] == "up_blocks.0"]
        lowest = min(mine, key=lambda row: float(row["icr"]))
        assert f"{name}: up_blocks.0" in done.stdout
        assert f"lowest ICR at sigma {float(lowest['sigma']):g}" in done.stdout
        assert all(0 <= float(row["accuracy"]) <= 1 for row in mine)
    again = [*command[:3], f"--study_dir={tmp_path / 'study'}"]  # as mlflow run hands it on
    before = (tmp_path / "study" / "noise_window.csv").read_text()
    (tmp_path / "study" / "noise_window.csv").unlink()
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "study" / "noise_window.csv").read_text() == before
    run, *_ = MlflowClient().search_runs(["0"], "tags.role = 'noise_window'")
    assert run.info.status == "FINISHED"
    assert {f.path for f in MlflowClient().list_artifacts(run.info.run_id)} >= {"noise_window.png", "noise_window.csv"}

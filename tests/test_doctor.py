"""The doctor: a good machine, a dead server, a store that takes nothing, weights that are not what they say, a broken torch."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from mlflow_icr.cli import main
from mlflow_icr.doctor import machine
from mlflow_icr.environment import WAIT_VARIABLES
from tests.servers import Server, free_port
from tests.stores import new_store

ROOT = Path(__file__).parents[1]


def checks(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, dict[str, str]]]:
    capsys.readouterr()
    status = main(["doctor", "--json", *flags])
    return status, {check["name"]: check for check in json.loads(capsys.readouterr().out)}


def rows_of(file: Path) -> dict[str, Any]:
    """Everything in a database, by table."""
    with sqlite3.connect(file) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {table: sorted(connection.execute(f'SELECT * FROM "{table}"').fetchall(), key=repr) for table in tables}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of MLflow's own making, with a run of somebody else's in it."""
    import mlflow

    folder = tmp_path_factory.mktemp("made")
    client = mlflow.MlflowClient(new_store(folder / "mlflow.db"))
    run = client.create_run("0", run_name="somebody else's")
    client.log_metric(run.info.run_id, "x", 1.0)
    return folder / "mlflow.db"


@pytest.fixture
def store(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the one that is used."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mlflow.db"
    shutil.copyfile(made, file)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    return file


def test_a_good_machine_is_left_as_it_was(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, files = rows_of(store), sorted(store.parent.rglob("*"))
    status, found = checks(capsys)
    assert status == 0, found
    assert {check["state"] for check in found.values()} <= {"ok", "warn"}
    assert found["torch"]["text"] == version("torch")
    for name in ("tracking store, writing", "artifact store", "mlflow.model_evaluator", "mlflow.run_context_provider"):
        assert found[name]["state"] == "ok", found[name]
    assert "from_image_folder" in found["mlflow.dataset_constructor"]["text"]
    assert found["encoder inception"]["state"] == "warn"
    assert "https://" in found["encoder inception"]["mend"]
    assert all(check["mend"] for check in found.values() if check["state"] != "ok")
    after = rows_of(store)
    assert {table: rows for table, rows in after.items() if rows != before[table]} == {}
    assert sorted(store.parent.rglob("*")) == files
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found)
    assert all(line.startswith(("ok    ", "warn  ")) for line in lines)


def test_a_store_that_is_not_there_yet_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = checks(capsys, "--tracking-uri", f"sqlite:///{tmp_path}/new.db")
    assert status == 0
    assert "the first run makes it" in found["tracking store"]["text"]
    assert list(tmp_path.iterdir()) == []


def test_a_dead_server_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # so that what the command sets is taken back
    port = free_port()
    status, found = checks(capsys, "--tracking-uri", f"http://me:hunter2@127.0.0.1:{port}")
    assert status == 1
    dead = found["tracking store"]
    assert dead["state"] == "bad"
    assert "does not answer" in dead["text"]
    assert f"127.0.0.1:{port}" in dead["text"]
    assert "hunter2" not in json.dumps(found)
    assert "artifact store" not in found


def test_a_store_that_can_be_read_but_not_written(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sqlite3.connect(store) as connection:
        for table in ("experiments", "runs", "metrics", "tags"):
            connection.execute(
                f"CREATE TRIGGER no_{table} BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'this store is read-only'); END"
            )
    status, found = checks(capsys)
    assert status == 1
    assert found["tracking store"]["state"] == "ok"
    assert found["tracking store, writing"]["state"] == "bad"
    assert found["tracking store, writing"]["mend"]


def test_weights_are_what_they_say_or_bad(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "inception.pt"
    broken.write_bytes(b"half a download")
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "config.json").write_text("{}")
    (clip / "model.safetensors").write_bytes(b"not one")
    status, found = checks(capsys, "--weights", f"inception={broken}", f"clip={clip}", f"sscd={tmp_path / 'nowhere.pt'}")
    assert status == 1
    assert found["encoder inception"]["state"] == "bad"
    assert "SHA-256" in found["encoder inception"]["text"]
    assert found["encoder clip"]["state"] == found["encoder sscd"]["state"] == "bad"
    assert main(["doctor", "--weights", "resnet=x"]) == 2
    assert "weights is 'resnet=x'; expected NAME=PATH" in capsys.readouterr().err


def test_a_torch_that_cannot_be_imported_is_a_line_and_not_a_crash(store: Path, tmp_path: Path) -> None:
    shadow = tmp_path / "shadow" / "torch"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    paths = os.pathsep.join([str(shadow.parent), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "mlflow_icr.cli", "doctor"],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    bad = [line for line in done.stdout.splitlines() if line.startswith("bad")]
    assert any("libcudart.so.12" in line for line in bad)
    assert "Traceback" not in done.stdout + done.stderr
    assert "ok    mlflow.run_context_provider" in done.stdout  # which needs no torch


@pytest.mark.slow
def test_a_server_shows_nothing_of_the_visit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    server = Server(tmp_path)
    server.start()
    try:
        status, found = checks(capsys, "--tracking-uri", server.uri)
        assert status == 0, found
        assert found["artifact store"]["state"] == "ok"
        client = mlflow.MlflowClient(server.uri)
        assert [experiment.name for experiment in client.search_experiments()] == ["Default"]
        assert [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()] == []
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("variables", "state"),
    [({}, "ok"), ({"OMP_WAIT_POLICY": "active"}, "warn"), ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}, "warn")],
)
def test_threads_that_spin_are_told_of(variables: dict[str, str], state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAIT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (check,) = machine.threads()
    assert check.state == state
    assert (state == "ok") or "OMP_WAIT_POLICY=passive" in check.mend


def test_the_trainers_threads_sleep_while_they_wait_unless_told_otherwise() -> None:
    """What OpenMP itself says that it has understood, when it is loaded with torch."""
    environment = {key: value for key, value in os.environ.items() if key not in WAIT_VARIABLES}
    for given, understood in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")):
        done = subprocess.run(
            [sys.executable, "-c", "import trainers, torch; torch.ones(9).sum()"],
            env=environment | given | {"OMP_DISPLAY_ENV": "true"}, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        if "OMP_WAIT_POLICY" not in done.stderr:
            pytest.skip("this torch has an OpenMP that does not say what it has understood")
        assert f"OMP_WAIT_POLICY = '{understood}'" in done.stderr

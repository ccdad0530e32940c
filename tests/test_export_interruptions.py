"""An export that is killed, repeated, run twice at once or left without a store; and what it says of bad input."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from mlflow_icr.bridge.tensorboard_export import export_runs
from mlflow_icr.cli import main
from mlflow_icr.tracking.mlflow import store
from tests import programs
from tests.servers import Server
from tests.test_export import START, decoded, export, line, log, new_run, picture, read, shown, stored


def start_export(logdir: Path, *more: str) -> programs.Program:
    return programs.start(
        ["-m", "mlflow_icr.cli", "export-tensorboard", "--experiment", "Default", "--logdir", str(logdir), *more]
    )


def wait_for(condition: Any, seconds: float = 150) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


def test_an_export_that_was_killed_heals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = new_run()
    for key in ("a", "b", "c"):
        log(run_id, key, line(6_000))
    process = start_export(tmp_path)

    def written() -> int:
        return sum(path.stat().st_size for path in tmp_path.glob("*/events*data"))

    wait_for(lambda: written() > 300_000)  # some page of the three metrics
    process.kill()
    process.wait()
    folder = next(tmp_path.iterdir())
    # What a kill in the middle of a page leaves: whole records and a torn one that no state knows of.
    with next(folder.glob("*data")).open("r+b") as file:
        state = json.loads((folder / ".mlflow-export.json").read_text())
        file.seek(state["size"])
        file.truncate()
        first = Path(file.name).read_bytes()[:4000]
        file.write(first[40:])
    assert sum(len(points) for points in shown(folder).values()) < 18_000
    export(tmp_path, run_id)
    assert shown(folder) == stored(run_id)

    # Files that do not fit the state are made anew.
    os.truncate(next(folder.glob("*data")), 12_345)
    next(folder.glob("*description")).unlink()
    export(tmp_path, run_id)
    assert shown(folder) == stored(run_id)
    (folder / ".mlflow-export.json").write_text('{"version"')
    export(tmp_path, run_id)
    assert shown(folder) == stored(run_id)
    assert read(folder).summary_metadata["_hparams_/session_start_info"]


def test_follow_mirrors_running_runs_until_they_end(tmp_path: Path) -> None:
    client = MlflowClient()
    first = new_run("first")
    log(first, "loss", line(5))
    process = start_export(tmp_path, "--follow", "--interval", "0.2")
    folders: dict[str, Path] = {}

    def mirrored(run_id: str) -> bool:
        found = list(tmp_path.glob(f"*-{run_id[:8]}"))
        folders.update({run_id: found[0]} if found else {})
        return bool(found) and shown(found[0]) == stored(run_id)

    wait_for(lambda: mirrored(first))
    log(first, "loss", line(5, start=5))
    wait_for(lambda: mirrored(first))
    second = new_run("second")
    log(second, "gain", line(3))
    wait_for(lambda: mirrored(second))
    client.set_terminated(first)
    log(second, "gain", line(4, start=3))
    client.set_terminated(second)
    done = process.wait(150)
    assert done.returncode == 0, done.stderr
    assert "FINISHED" in done.stdout
    assert mirrored(first)
    assert mirrored(second)

    third = new_run("third")
    log(third, "loss", line(5))
    process = start_export(tmp_path, "--follow", "--interval", "0.2")
    wait_for(lambda: mirrored(third))
    process.kill(signal.SIGINT)
    done = process.wait(150)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert mirrored(third)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--experiment", "nope"], r"experiment is 'nope'.*expected one of \['Default'\]"),
        (["--run-id", "0" * 32], "run_id is '0{32}'"),
        (["--experiment", "Default", "--follow", "--interval", "-1"], "interval is -1.0; expected seconds above 0"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    assert main(["export-tensorboard", "--logdir", str(tmp_path), *arguments]) == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if "INFO mlflow" not in text]  # of the new database
    assert len(errors) == 1
    assert re.search(said, errors[0])


def test_a_logdir_that_is_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["export-tensorboard", "--logdir", str(tmp_path / "file"), "--experiment", "Default"]) == 2
    assert capsys.readouterr().err.startswith(f"mlflow-icr: error: logdir is '{tmp_path}/file', ")


def test_a_dead_server_is_one_line_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for variable in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"):
        monkeypatch.setenv(variable, "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:9")  # nothing listens there
    assert main(["export-tensorboard", "--logdir", str(tmp_path), "--experiment", "Default"]) == 2
    found = "".join(capfd.readouterr())
    assert "hunter2" not in found
    assert found.count("\n") == 1
    assert "does not answer" in found


def test_credentials_are_taken_out_of_any_message() -> None:
    uri = "postgresql://me:p%40ss@db/x?sslpassword=s3cret"
    text = store.without_credentials(f"cannot open {uri} or p@ss, http://a:b@c/d", uri)
    for secret in ("p%40ss", "p@ss", "s3cret", "a:b"):
        assert secret not in text


def test_two_exports_at_once_do_not_spoil_each_other(tmp_path: Path) -> None:
    from mlflow_icr.tracking.tensorboard.event_file import EventFile

    run_id = new_run()
    log(run_id, "loss", line(2))
    folder = export(tmp_path, run_id)
    with EventFile(folder / "events.out.tfevents.mlflow.1.data"), pytest.raises(ValueError, match="another export"):
        export(tmp_path, run_id)
    assert shown(folder) == stored(run_id)


def test_follow_waits_for_a_store_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = new_run()
    log(run_id, "loss", line(2))
    said: list[str] = []
    real = store.runs
    looks = 0

    def sometimes(*arguments: Any) -> Any:
        nonlocal looks
        looks += 1
        if looks in (2, 3):
            raise store.StoreError("it does not answer")
        if looks == 4:
            log(run_id, "loss", line(2, start=2))
            MlflowClient().set_terminated(run_id)
        return real(*arguments)

    monkeypatch.setattr(store, "runs", sometimes)
    found = export_runs(tmp_path, experiment="Default", follow=True, interval=0.01, echo=said.append)
    assert sum(run.new_points for run in found) == 4
    assert said == ["it does not answer; waiting for it"]
    assert threading.active_count() < 50


def test_over_http_and_no_password_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server = Server(tmp_path)
    server.start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri.replace("://", "://user:hunter2@"))
        monkeypatch.setattr(store, "PAGE", 100)
        run_id = new_run()
        log(run_id, "loss/train", [*line(250), (1, START, math.inf)])
        MlflowClient().log_image(run_id, picture(1), key="samples/ema", step=5, timestamp=START, synchronous=True)
        capfd.readouterr()
        logdir = str(tmp_path / "tb")
        assert main(["export-tensorboard", "--logdir", logdir, "--run-id", run_id]) == 0
        assert main(["import-tensorboard", logdir, "--experiment", "back"]) == 0
        assert main(["export-tensorboard", "--logdir", logdir, "--run-id", "nope"]) == 2
        assert "hunter2" not in "".join(capfd.readouterr())
        [folder] = (tmp_path / "tb").iterdir()
        assert shown(folder) == stored(run_id)
        assert np.array_equal(decoded(read(folder).Images("samples/ema")[0]), picture(1))
        [back] = MlflowClient().search_runs([MlflowClient().get_experiment_by_name("back").experiment_id])
        assert stored(back.info.run_id) == stored(run_id)
    finally:
        server.kill()

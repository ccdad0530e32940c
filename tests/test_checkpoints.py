"""Checkpoints are models: one each, with its metrics, its weights and a sampler; and the one to keep is kept, and found."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlflow_icr import EDMDenoiser, Report, best_checkpoint, heun_sample
from mlflow_icr.cli import main
from mlflow_icr.extraction.samplers import starting_noise
from mlflow_icr.monitoring.generation import to_uint8
from mlflow_icr.monitoring.verdict import Verdict
from mlflow_icr.tracking import MLflowSink, Tracker, read_history
from mlflow_icr.tracking.checkpoints.folder import checkpoint_path, checkpoints, remove_old
from tests import programs
from tests.checkpoint_runs import ICR, STEPS, measured, models_of, trained
from tests.servers import Server


def artifacts_of(model: Any, folder: str | None = None) -> set[str]:
    from mlflow import MlflowClient

    found: set[str] = set()
    for entry in MlflowClient().list_logged_model_artifacts(model.model_id, folder):
        found |= artifacts_of(model, entry.path) if entry.is_dir else {entry.path}
    return found


WEIGHTS = "artifacts/pipeline/unet/diffusion_pytorch_model.safetensors"
WHOLE = {
    "MLmodel", "pipeline_code.py", "requirements.txt", "conda.yaml", "python_env.yaml", WEIGHTS,
    "artifacts/pipeline/model_index.json", "artifacts/pipeline/unet/config.json",
    "artifacts/pipeline/scheduler/scheduler_config.json",
}  # fmt: skip


def assert_one_model_for_each_checkpoint(folder: Path) -> dict[int, Any]:
    """And its metrics are the journal's row, at the run's own points, each of which is there once."""
    from mlflow import MlflowClient

    client = MlflowClient()
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    models = models_of(run_id)
    rows = {int(row["images_seen"]): row for row in read_history(folder)}
    there = checkpoints(folder)
    assert set(there) <= set(models) <= set(rows)
    histories: dict[str, list[Any]] = {}
    for step, model in models.items():
        metrics = {m.key: (m.value, m.step, m.timestamp) for m in model.metrics}
        assert len(metrics) == len(model.metrics)
        assert {key: value for key, (value, *_) in metrics.items()} == {
            k: v for k, v in rows[step].items() if k != "images_seen"
        }
        for key, (value, at, timestamp) in metrics.items():
            points = histories.setdefault(key, client.get_metric_history(run_id, key))
            assert [(p.value, p.timestamp) for p in points if p.step == at] == [(value, timestamp)]
            assert at == step
        assert str(model.status) == "READY"
        if step in there:
            assert artifacts_of(model) == WHOLE
    outputs = client.get_run(run_id).outputs.model_outputs
    assert Counter((o.model_id, o.step) for o in outputs) == Counter((m.model_id, step) for step, m in models.items())
    return models


def test_each_checkpoint_is_a_model_with_its_metrics(pipeline: Path, tmp_path: Path) -> None:
    import mlflow

    sink = trained(tmp_path / "run", pipeline)
    models = assert_one_model_for_each_checkpoint(tmp_path / "run")
    assert {step: model.name for step, model in models.items()} == {step: f"checkpoint-{step:012d}" for step in STEPS}
    assert {step: model.tags.get("role") for step, model in models.items()} == {0: None, 100: None, 200: None, 300: "newest"}
    assert {(m.params["seed"], m.model_type, m.source_run_id) for m in models.values()} == {("1", "diffusion", sink.run_id)}
    (best,) = mlflow.search_logged_models(
        experiment_ids=["0"],
        order_by=[{"field_name": "metrics.repr/icr", "ascending": True}],
        max_results=1,
        output_format="list",
    )
    assert best.tags["images_seen"] == "200"
    assert main(["sync", str(tmp_path / "run")]) == 0  # a repeat adds nothing
    assert {m.model_id for m in assert_one_model_for_each_checkpoint(tmp_path / "run").values()} == {
        m.model_id for m in models.values()
    }


def test_the_checkpoint_to_keep_gets_an_alias(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    turned = Verdict("turning", turned_at=200, low=200, high=300, checkpoint_images_seen=100)
    monkeypatch.setattr(Tracker, "verdict", property(lambda tracker: turned))
    sink = trained(tmp_path / "run", pipeline, "kept", register="digits")
    client = MlflowClient()
    for _ in range(2):
        version = client.get_model_version_by_alias("digits", "keep")
        assert (version.run_id, version.source) == (sink.run_id, models_of(sink.run_id)[100].artifact_location)
        assert [one.tags for one in client.search_model_versions("name = 'digits'")] == [{"images_seen": "100"}]
        assert main(["sync", "--tracking-uri", os.environ["MLFLOW_TRACKING_URI"], str(tmp_path / "run")]) == 0
    for name, log_models, message in (
        ("a/b", "all", "register is 'a/b'; expected the name of a registered model"),
        ("digits", "none", "register is 'digits' and log_models 'none'; expected log_models all or kept"),
    ):
        with pytest.raises(ValueError, match=message):
            MLflowSink(register=name, log_models=log_models)


def test_a_fresh_process_samples_a_model(pipeline: Path, tmp_path: Path, small_unet: torch.nn.Module) -> None:
    sink = MLflowSink(log_models="all", register="digits")
    tracker = Tracker(tmp_path / "run", [sink])
    tracker.open({}, {})
    measured(tracker, 100, pipeline)
    tracker.close("FINISHED")
    code = """
import sys, mlflow, numpy as np, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
x = model.predict({"num_images": 3, "seed": 7, "steps": 4})
frame = pd.DataFrame({"num_images": [3, 1], "seed": [7, 8], "steps": [4, 4]})
assert np.array_equal(model.predict(frame)[:3], x) and len(model.predict(frame)) == 4
assert model.predict({}).shape == (1, 8, 8, 1) and model.predict({"num_images": 0}).shape == (0, 8, 8, 1)
for bad, message in (({"steps": 1}, "steps is 1; expected a whole number >= 2"), ({"class_label": 0}, "without classes")):
    try:
        model.predict(bad)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(bad)
np.save(sys.argv[2], x)
"""
    done = programs.run(["-c", code, "models:/digits@keep", str(tmp_path / "x.npy")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sampled = np.load(tmp_path / "x.npy")
    small_unet.eval()
    expected = heun_sample(EDMDenoiser(small_unet), starting_noise(range(3), (1, 8, 8), 7), num_steps=4)
    assert sampled.dtype == np.uint8
    assert abs(sampled.astype(int) - to_uint8(expected).permute(0, 2, 3, 1).numpy()).max() <= 1


def test_a_model_of_classes_samples_the_class_that_is_asked_for() -> None:
    from diffusers import UNet2DModel

    from mlflow_icr.tracking.checkpoints.sampling_model import sample_images

    torch.manual_seed(0)
    blocks = {"block_out_channels": (16, 16), "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, num_class_embeds=3, **blocks
    )
    with torch.no_grad():
        network.class_embedding.weight.mul_(20)
    loaded = (EDMDenoiser(network, null_class=2), 8)
    one, two = (sample_images(loaded, range(2), steps=4, class_label=label) for label in (0, 1))
    assert not np.array_equal(one, two)
    assert np.array_equal(one, sample_images(loaded, range(2), steps=4, class_label=0))
    none = sample_images(loaded, range(2), steps=4)
    assert np.array_equal(none, sample_images(loaded, range(2), steps=4, class_label=2))
    with pytest.raises(ValueError, match="class_label is 3; expected a class of this model, 0 to 2, which means none"):
        sample_images(loaded, [0], class_label=3)
    with pytest.raises(ValueError, match="class_label is 0, but this model was trained without classes"):
        sample_images((EDMDenoiser(network), 8), [0], class_label=0)


def test_only_what_is_kept_is_uploaded_where_that_is_wanted(pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    sink = trained(folder, pipeline, "kept")
    models = models_of(sink.run_id)
    assert {step: "MLmodel" in artifacts_of(model) for step, model in models.items()} == {
        0: False,
        100: False,
        200: False,
        300: True,
    }
    assert {step: model.tags["weights"] for step, model in models.items()} == dict.fromkeys(
        STEPS[:3], "in the output folder"
    ) | {300: "uploaded"}
    assert {len(model.metrics) for model in models.values()} == {3}
    assert {model.tags.get("mlflow.model.isExternal") for step, model in models.items() if step < 300} == {"true"}
    assert "mlflow.model.isExternal" not in models[300].tags
    assert models_of(trained(tmp_path / "none", pipeline, "none").run_id) == {}
    assert not (tmp_path / "none" / "models.jsonl").exists()
    with pytest.raises(ValueError, match="log_models is 'some'; expected one of all, kept, none"):
        MLflowSink(log_models="some")


def test_a_checkpoint_that_is_gone_before_its_upload_is_a_model_that_says_so(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("mlflow_icr.tracking.worker.PAUSES", (0.01,))
    trained(folder, pipeline)
    assert remove_old(folder, 1, {100}) == [0, 200]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/late.db")  # where the assertions look
    monkeypatch.chdir(tmp_path)
    assert main(["sync", "--tracking-uri", f"sqlite:///{tmp_path}/late.db", str(folder)]) == 0
    models = assert_one_model_for_each_checkpoint(folder)
    assert {step: (model.tags["weights"], "mlflow.model.isExternal" in model.tags) for step, model in models.items()} == {
        100: ("uploaded", False), 300: ("uploaded", False),
        0: ("removed from the output folder before they were uploaded", True),
        200: ("removed from the output folder before they were uploaded", True),
    }  # fmt: skip


def test_a_checkpoint_that_nobody_was_told_of_is_told_by_whoever_comes_next(pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tracker = Tracker(folder, [MLflowSink(log_models="all")])
    tracker.open({}, {})
    measured(tracker, 0, pipeline)
    tracker.close("KILLED")
    shutil.copytree(pipeline, checkpoint_path(folder, 100))  # saved, and then killed
    tracker.journal.append(Report(100, {"repr/icr": 0.5}))
    shutil.copytree(pipeline, checkpoint_path(folder, 150))  # of a kill between measurements: not a measured one
    assert main(["sync", str(folder)]) == 0
    shutil.rmtree(checkpoint_path(folder, 150))
    assert set(assert_one_model_for_each_checkpoint(folder)) == {0, 100}


def test_an_answer_that_is_lost_makes_no_model_twice(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call to the store works, and then seems to have failed, once."""
    from mlflow import MlflowClient

    failed = set()

    def lossy(name: str) -> None:
        real = getattr(MlflowClient, name)

        def call(self: MlflowClient, *arguments: Any, **options: Any) -> Any:
            answer = real(self, *arguments, **options)
            content = (name, *(os.path.basename(str(part)) for part in arguments), str(sorted(options)))
            if threading.current_thread() is not threading.main_thread() and content not in failed:
                failed.add(content)
                raise ConnectionError("the answer is lost")
            return answer

        monkeypatch.setattr(MlflowClient, name, call)

    for name in ("create_logged_model", "log_outputs", "log_batch", "log_model_artifact", "set_logged_model_tags",
                 "finalize_logged_model"):  # fmt: skip
        lossy(name)
    monkeypatch.setattr("mlflow_icr.tracking.worker.PAUSES", (0.01,))
    sink = MLflowSink(log_models="all")
    tracker = Tracker(tmp_path / "run", [sink])
    tracker.open({}, {})
    for step in STEPS[:2]:
        measured(tracker, step, pipeline)
    tracker.flush_local()
    for _ in range(200):
        if sink.flush():
            break
    assert {name for name, *_ in failed} >= {"create_logged_model", "log_model_artifact", "finalize_logged_model"}
    tracker.close("FINISHED")
    assert_one_model_for_each_checkpoint(tmp_path / "run")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


def train_until_killed(folder: Path, pipeline: Path) -> None:
    """In a child process, which never comes back."""
    try:
        shutil.rmtree(folder / "part", ignore_errors=True)
        tracker = Tracker(folder, [MLflowSink(log_models="all")], resume="allow")
        tracker.open({"seed": 1}, {})
        step = max(tracker.journal.steps, default=-100) + 100
        while True:
            measured(tracker, step, pipeline)
            step += 100
            time.sleep(0.4)
    finally:
        os._exit(1)


@pytest.mark.slow
def test_a_real_server_that_dies_and_trainings_that_are_killed(
    server: Server, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow  # noqa: F401 - the children start with what is loaded here

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder, moments = tmp_path / "run", random.Random(20260609)
    for round_ in range(4):
        child = os.fork()
        if child == 0:
            train_until_killed(folder, pipeline)
        time.sleep(moments.uniform(0.3, 1.5))
        if round_ == 2:
            server.kill()
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    server.start()
    assert len(checkpoints(folder)) > 3
    for _ in range(2):
        assert main(["sync", str(folder)]) == 0
        models = assert_one_model_for_each_checkpoint(folder)
    assert set(models) == set(checkpoints(folder))
    got = best_checkpoint(json.loads((folder / "mlflow.json").read_text())["run_id"], output_dir=tmp_path / "got")
    assert (got / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == (
        pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    ).read_bytes()


@pytest.fixture
def old_server(server: Server) -> Iterator[str]:
    """A server as it was before it had models: in front of a real one, what does not know their addresses."""

    class Old(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "logged-models" in self.path:
                self.send_error(404)
                return
            request = urllib.request.Request(server.uri + self.path, body or None, method=self.command)
            request.add_header("Content-Type", self.headers.get("Content-Type") or "application/json")
            try:
                with urllib.request.urlopen(request, timeout=60) as there:
                    status, content = there.status, there.read()
            except urllib.error.HTTPError as error:
                status, content = error.code, error.read()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None: ...

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Old)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_port}"
    proxy.shutdown()


def test_a_server_without_models_gets_the_rest_and_one_warning(
    server: Server,
    old_server: str,
    pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", old_server)
    sink = trained(tmp_path / "run", pipeline)
    assert sink.run_id is not None
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warnings == ["MLflow refuses model (this server has no logged models; checkpoints stay in the output folder)"]
    run = MlflowClient().get_run(sink.run_id)
    assert (run.info.status, run.data.metrics["repr/icr"]) == ("FINISHED", ICR[300])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)  # it has been brought up to date
    assert main(["sync", "--tracking-uri", server.uri, str(tmp_path / "run")]) == 0
    assert_one_model_for_each_checkpoint(tmp_path / "run")

"""The main job shows what it is for. Slow: about five minutes a study on two cores; other seeds by ICR_DEMO=N:SEED,N:SEED."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_icr import summarise, verdict
from mlflow_icr.tracking import read_history
from tests.test_tracking import as_float32, journal_scalars, mlflow_scalars, tensorboard_scalars

ROOT = Path(__file__).parents[1]
STUDIES = [tuple(map(int, study.split(":"))) for study in os.environ.get("ICR_DEMO", "128:0,96:101,144:202").split(",")]


@pytest.mark.slow
@pytest.mark.parametrize(("num_images", "seed"), STUDIES)
def test_the_limited_run_turns_before_it_copies_and_the_control_does_not_copy(
    tmp_path: Path, num_images: int, seed: int
) -> None:
    from mlflow import MlflowClient

    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "--env-manager", "local", "-P", f"num_images={num_images}"]
    command += ["-P", f"seed={seed}", "-P", f"output_dir={tmp_path / 'study'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr

    limited, control = (read_history(tmp_path / "study" / role) for role in ("limited", "control"))
    print(done.stdout[-2500:])
    assert len(limited) >= 12
    found = summarise(limited)
    lowest = next(row for row in limited if row["images_seen"] == found["icr_min_images_seen"])
    end = limited[-1]
    assert limited[0]["images_seen"] < lowest["images_seen"] < end["images_seen"]
    assert end["repr/icr"] - lowest["repr/icr"] >= 0.01
    assert lowest["mem/ratio_l2"] <= 0.02
    assert end["mem/ratio_l2"] >= 0.4
    assert end["repr/fisher_residual_energy"] >= 1.3 * lowest["repr/fisher_residual_energy"]
    assert found["lead_images"] > 0
    assert max(row["mem/ratio_l2"] for row in control) <= 0.02
    said = verdict(limited)
    assert said.state == "memorizing"
    assert said.turned_at is not None
    assert said.turned_at < found["mem_onset_images_seen"]
    assert verdict(control).state == "generalizing"

    for role in ("limited", "control"):
        (run,) = MlflowClient().search_runs(["0"], f"tags.role = '{role}'")
        journal = journal_scalars(tmp_path / "study" / role)
        stored, shown = mlflow_scalars(run.info.run_id), tensorboard_scalars(tmp_path / "study" / role)
        assert {key: stored[key] for key in journal} == journal
        assert {key: shown[key] for key in journal} == as_float32(journal)

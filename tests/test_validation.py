"""The validation study: its rules, its runs, and that its page says what its result files hold."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from mlflow_icr import NoiseSweep
from mlflow_icr.monitoring.sweep import SweepPoint
from studies.validation.coverage import FAMILIES, Coverage, measure_coverage, read_coverages, simulate_missing
from studies.validation.report import chosen_on, read_outcomes, write_report
from studies.validation.rules import (
    RULES,
    Outcome,
    alarm,
    choose_threshold,
    rates,
    verdict_alarm,
)
from studies.validation.runs import ValidationRun, all_runs, train_missing
from studies.validation.window import read_sweeps, window_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "validation" / "runs"


def outcome(name: str, icrs: list[float], onset: int | None, rich: bool = False) -> Outcome:
    return Outcome(name, [{"images_seen": 10 * (i + 1), "repr/icr": v} for i, v in enumerate(icrs)], rich, onset)


def test_alarms_thresholds_and_rates_by_hand() -> None:
    argmin = next(rule for rule in RULES if "argmin" in rule.name)
    runs = [
        outcome("a", [0.9, 0.8, 0.84, 0.9], onset=40),  # rises by .04 at 30
        outcome("b", [0.9, 0.8, 0.82, 0.9], onset=40),  # by .02 at 30
        outcome("c", [0.9, 0.8, 0.79, 0.78], onset=None),  # copies nothing: not counted
        outcome("rich", [0.9, 0.8, 0.81, 0.81], onset=None, rich=True),  # by .01
    ]
    assert argmin.score(runs[0].rows) == [(10, 0), (20, 0), (30, pytest.approx(0.04)), (40, pytest.approx(0.1))]
    threshold = choose_threshold(argmin.score, runs)
    assert 0.01 < threshold < 0.02
    alarms = {o.name: alarm(argmin.score(o.rows), threshold) for o in runs}
    assert alarms == {"a": 30, "b": 30, "c": None, "rich": None}
    found = rates(runs, alarms)
    assert (found.caught, found.limited, found.false_alarms, found.rich) == (2, 2, 0, 1)
    assert (found.caught_rate, found.false_alarm_rate) == (1, 0)
    assert (found.leads, found.shares) == ((10, 10), (0.75, 0.75))
    # At the onset is not ahead of it, and an accused rich run counts whenever that was.
    late = rates(runs, {"a": 40, "b": 50, "c": 10, "rich": 10})
    assert (late.caught, late.false_alarms) == (0, 1)
    assert math.isnan(rates(runs[:3], alarms).false_alarm_rate)


def test_every_rule_reads_what_it_says() -> None:
    row = {
        "repr/icr": 0.7, "repr/icr_rise_low": -0.01, "repr/view_error_ratio": 2.0, "repr/fisher_residual_energy": 1e-5,
        "repr/alignment": 0.3, "repr/rankme": 9.0,
    }  # fmt: skip
    losses = {"loss/train_eval": 0.4, "loss/heldout": 0.5}
    rows = [{"images_seen": 2 ** (i + 8)} | row | losses for i in range(6)]
    for rule in RULES:
        assert rule.score(rows), rule.name
        without = [{key: value for key, value in r.items() if not key.startswith("loss/")} for r in rows]
        assert bool(rule.score(without)) is not rule.heldout, rule.name


def test_the_planned_runs_are_those_of_the_study() -> None:
    runs = all_runs()
    assert len({run.name for run in runs}) == len(runs)
    digits = [run for run in runs if run.preset == "digits"]
    for rich in (False, True):
        assert len([run for run in digits if run.rich is rich]) == 20
        # Each half has every size and every budget.
        halves = [
            {(r.num_images, r.total_kimg) for r in digits if r.rich is rich and chosen_on(r) is half} for half in (True, False)
        ]
        assert halves[0] == halves[1]
    for preset in ("mnist5k", "fashion-mnist"):
        assert [run.rich for run in runs if run.preset == preset].count(True) == 2
        assert [run.rich for run in runs if run.preset == preset].count(False) == 4
        assert not any(chosen_on(run) for run in runs if run.preset == preset)


@pytest.mark.slow
def test_runs_are_trained_once_and_failures_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Short(ValidationRun):
        def flags(self, output_dir: Path) -> list[str]:
            return [
                *super().flags(output_dir), "--total-kimg=0.6", "--first-measurement-kimg=0.3", "--measurements=2",
                "--block-channels=16,32", "--num-samples=8", "--sample-steps=2",
            ]  # fmt: skip

    good, bad = Short("digits", 24, 1, 1, rich=False), Short("digits", 4000, 1, 1, rich=True)
    work, results = tmp_path / "work", tmp_path / "results"
    failures = train_missing([good, bad], work, results, 1)
    assert len(failures) == 1
    assert "digits-rich-n4000-seed1: exit status 2 (trainers.train: error: num_images is 4000" in failures[0]
    kept = results / good.name
    assert {path.name for path in kept.iterdir()} == {"history.jsonl", "config.yaml"}
    assert not (work / good.name / "checkpoints").exists()
    before = (kept / "history.jsonl").stat().st_mtime_ns
    shutil.rmtree(work)
    assert train_missing([good], work, results, 1) == []
    assert (kept / "history.jsonl").stat().st_mtime_ns == before
    assert "1/2 digits-limited-n24-seed1" in capsys.readouterr().out


def test_simulations_go_on_where_they_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def simulated(family: object, n: int, k: int, d: int, repeats: int) -> Coverage:
        calls.append((family, n, k, d))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Coverage("Gaussian", n, k, d, 0.5, 0.4, 0.5, 0.5, 0.01, 0.01, 0.95, repeats)

    monkeypatch.setattr("studies.validation.coverage.measure_coverage", simulated)
    monkeypatch.setattr("studies.validation.coverage.FAMILIES", FAMILIES[:1])
    path = tmp_path / "coverage.csv"
    with pytest.raises(KeyboardInterrupt):
        simulate_missing(path, 7)
    assert len(read_coverages(path)) == 2
    simulate_missing(path, 7)
    rows = read_coverages(path)
    assert len(rows) == len({(row.n, row.k, row.d) for row in rows}) == len(calls) - 1
    assert rows[0].coverage == 0.95
    assert isinstance(rows[0].n, int)


def test_the_plugin_is_recovered_from_the_closed_form() -> None:
    import torch

    from mlflow_icr import icr

    found = measure_coverage(FAMILIES[0], 40, 3, 8, repeats=1, seed=5)
    import numpy as np

    from studies.validation.coverage import simulator

    draw, truth = simulator(np.random.default_rng([5, 40, 3, 8, 0]), FAMILIES[0], 40, 3, 8)
    spectrum = icr(torch.from_numpy(draw()))
    assert found.truth == truth
    assert found.plugin == pytest.approx(spectrum.icr, rel=1e-9)
    assert found.debiased == pytest.approx(spectrum.icr_debiased, rel=1e-9)


def test_the_window_is_told_from_a_kept_sweep(tmp_path: Path) -> None:
    icrs, accuracies = (0.6, 0.5, 0.45, 0.7), (0.5, 0.9, 0.8, 0.2)
    points = tuple(
        SweepPoint(sigma, "mid_block", 8, icr, icr - 0.01, icr + 0.01, accuracy, "", icr - 0.45, icr - 0.46)
        for sigma, icr, accuracy in zip((0.1, 0.2, 0.4, 0.8), icrs, accuracies, strict=True)
    )
    bare = SweepPoint(0.1, "up_blocks.0", 8, None, None, None, None, "too few images")
    sweep = NoiseSweep((*points, bare), 9, 2)
    (tmp_path / "sweeps.json").write_text(json.dumps({"rich": sweep.as_dict()}))
    assert read_sweeps(tmp_path / "sweeps.json") == {"rich": sweep}
    assert window_rows({"rich": sweep}) == [
        ["rich", "mid_block", "0.4", "0.450", "0.150 (at least 0.140)", "yes", "0.2", "0.900", "1", "0.100"],
        ["rich", "up_blocks.0", "-", "-", "-", "no", "-", "-", "-", "-"],
    ]


def test_the_page_says_what_the_result_files_hold(tmp_path: Path) -> None:
    """Written anew, `docs/validation.md` is the same text, so no number in it is anybody's memory."""
    docs = tmp_path / "docs"
    (docs / "images").mkdir(parents=True)
    shutil.copytree(ROOT / "docs" / "validation", docs / "validation")
    shutil.copy(ROOT / "docs" / "validation.template.md", docs)
    write_report(read_outcomes(docs / "validation" / "runs"), all_runs(), docs)
    assert (docs / "validation.md").read_text() == (ROOT / "docs" / "validation.md").read_text()
    assert (docs / "images" / "validation.png").stat().st_size > 10_000


def test_the_verdict_keeps_its_rates_on_the_kept_histories() -> None:
    outcomes = list(read_outcomes(RESULTS).values())
    found = rates(outcomes, {o.name: verdict_alarm(o.rows) for o in outcomes})
    assert found.limited >= 2
    assert found.rich >= 1
    assert found.caught_rate >= 0.9
    assert found.false_alarm_rate <= 0.05

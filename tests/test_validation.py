"""The validation study: its plan, its rules against independent computations, and that its page says what its files hold."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import somersd

from mlflow_icr import NoiseSweep
from mlflow_icr.monitoring.sweep import SweepPoint
from studies.validation.coverage import FAMILIES, Coverage, measure_coverage, read_coverages, simulate_missing
from studies.validation.design import PLAN, chosen_on, cost_of, design, kimg_needed, text_of
from studies.validation.outcomes import LEADING, TWO, Outcome, lasting_onset, onsets_of
from studies.validation.report import write_report
from studies.validation.results import Result, read_results, write_result
from studies.validation.rivals import EPOCHS, RULES, STEPS
from studies.validation.rules import (
    Rule,
    alarm,
    alarms_of,
    choose_threshold,
    concordance,
    level,
    over_lowest,
    rates,
    with_threshold,
)
from studies.validation.runs import PlannedRun, missing_feature, read_plan, select, train_missing
from studies.validation.tables import forecast_coverage
from studies.validation.window import read_sweeps, window_rows

ROOT = Path(__file__).parents[1]


def outcome(name: str, values: list[float], onset: int | None, *, num_images: int = 10, clean: bool = True) -> Outcome:
    """A run measured every ten images seen; one that is neither copying nor clean is copied from by another detector alone."""
    rows = [{"images_seen": 10 * (i + 1), "repr/icr": v} for i, v in enumerate(values)]
    other = 10 if onset is None and not clean else None
    onsets = {LEADING: onset, "C_T": other, TWO: None}
    return Outcome(name, {"images": "digits8", "num_images": num_images}, True, rows, onsets)


def test_an_onset_lasts_to_the_end() -> None:
    rows = [{"images_seen": i, "mem/ratio_l2": r} for i, r in enumerate([0.2, 0.0, 0.1, 0.05, 0.06, 0.9])]
    assert lasting_onset(rows, "mem/ratio_l2", above=0.05) == 4
    assert lasting_onset(rows[:4], "mem/ratio_l2", above=0.05) is None
    assert lasting_onset(rows, "mem/ratio_l2", below=0.95) == 0
    truth = read_plan().truth
    values = [(0, 1), (0, -4), (0.1, -5), (0.2, -6)]
    rows = [{"images_seen": i, "mem/ratio_l2": ratio, "mem/ct": ct} for i, (ratio, ct) in enumerate(values)]
    # What was not measured is no detector of that run; the second to speak makes two.
    assert onsets_of(rows, truth) == {"distance ratio": 2, "C_T": 1, TWO: 2}
    assert onsets_of(rows[:2], truth)[TWO] is None


def test_alarms_thresholds_and_rates_by_hand() -> None:
    argmin = Rule("argmin", over_lowest("repr/icr", relative=False))
    runs = [
        outcome("a", [0.9, 0.8, 0.84, 0.9], onset=40),  # rises by .04 at 30
        outcome("b", [0.9, 0.8, 0.82, 0.9], onset=40),  # by .02 at 30
        outcome("disputed", [0.9, 0.8, 0.9, 0.9], onset=None, clean=False),
        outcome("clean", [0.9, 0.8, 0.81, 0.81, 0.81, 0.81], onset=None),  # by .01 at 30, and copies nothing until 60
    ]
    assert argmin.score(runs[0]) == [(10, 0), (20, 0), (30, pytest.approx(0.04)), (40, pytest.approx(0.1))]
    threshold, caught = choose_threshold(argmin.score, runs, LEADING, 2)
    assert 0.01 < threshold < 0.02
    assert caught == 1
    found = rates(runs, alarms_of(replace(argmin, threshold=threshold), runs), LEADING, 2)
    assert (found.caught, found.copying, found.false_alarms, found.open, found.clean) == (2, 2, 0, 0, 1)
    assert found.shares == (0.75, 0.75)
    # At the onset is not ahead of it. Twice as far without a copy, an alarm is false; before that it is open.
    late = rates(runs, {"a": 40, "b": 50, "disputed": 10, "clean": 30}, LEADING, 2)
    assert (late.caught, late.false_alarms, late.open, late.false_alarm_rate) == (0, 1, 0, 1)
    early = rates(runs, {"a": 40, "b": 50, "disputed": 10, "clean": 40}, LEADING, 2)
    assert (early.false_alarms, early.open) == (0, 1)
    assert math.isnan(early.false_alarm_rate)
    # By a detector that finds copies in the disputed run alone, the others are neither copying nor all clean.
    other = rates(runs, dict.fromkeys("abc", 1) | {"disputed": 5, "clean": None}, "C_T", 2)
    assert (other.caught, other.copying, other.clean) == (1, 1, 1)


def test_a_sign_is_chosen_with_the_threshold() -> None:
    falling = [
        outcome("a", [0.9, 0.5, 0.4], onset=30),
        outcome("b", [0.9, 0.4, 0.3], onset=30),
        outcome("clean", [0.9, 0.8, 0.8, 0.8], onset=None),
    ]
    rule = with_threshold(Rule("x", level("repr/icr"), either_way=True), falling, LEADING, 2)
    assert rule.name == "x, falling"
    assert -0.8 < (rule.threshold or 0) < -0.5
    assert alarms_of(rule, falling) == {"a": 20, "b": 20, "clean": None}
    assert alarm(rule.score(falling[0]), -0.45) == 30


def brute_concordance(runs: list[Outcome], signals: dict[str, float], horizon: float) -> tuple[float, int]:
    """Harrell's concordance from its definition, pair by pair."""

    def time(o: Outcome) -> float:
        onset = o.onsets[LEADING]
        return (o.end if onset is None else onset) / o.num_images

    there = [o for o in runs if time(o) >= horizon and (o.onsets[LEADING] is None or time(o) > horizon)]
    right, pairs = 0.0, 0
    for a in (o for o in there if o.onsets[LEADING] is not None):
        for b in there:
            if time(a) < time(b) or (time(a) == time(b) and b.onsets[LEADING] is None):
                pairs += 1
                right += 0.5 if signals[a.name] == signals[b.name] else float(signals[a.name] > signals[b.name])
    return right, pairs


def test_concordance_is_harrells() -> None:
    rng = random.Random(3)
    runs, signals = [], {}
    for i in range(40):
        count, num_images = rng.randint(3, 30), rng.choice([5, 10, 20])
        signals[f"r{i}"] = rng.choice([0.1, 0.2, 0.3, rng.random()])  # with ties
        onset = rng.choice([None, 10 * rng.randint(2, count)])
        runs.append(outcome(f"r{i}", [signals[f"r{i}"]] * count, onset, num_images=num_images))
    horizons = (2, 5)
    totals = [brute_concordance(runs, signals, h) for h in horizons]
    found = concordance(level("repr/icr"), runs, LEADING, horizons, draws=50)
    assert found.pairs == sum(pairs for _, pairs in totals) > 100
    assert found.value == pytest.approx(sum(right for right, _ in totals) / found.pairs)
    assert found.low < found.value < found.high
    # Without censoring it is Somers' D of the signal on the time, scaled to 0 to 1.
    whole = [replace(o, onsets={LEADING: o.end, TWO: None}) for o in runs if o.end > 2 * o.num_images]
    times = [-o.end / o.num_images for o in whole]
    somers = somersd(times, [signals[o.name] for o in whole]).statistic
    assert concordance(level("repr/icr"), whole, LEADING, (2,), draws=0).value == pytest.approx((1 + somers) / 2)
    # A run that is disputed has no time at which it surely had copied nothing.
    disputed = outcome("disputed", [9.0] * 30, None, clean=False)
    assert concordance(level("repr/icr"), [*runs, disputed], LEADING, horizons, draws=0).value == found.value


def test_epochs_have_a_half_by_construction() -> None:
    runs = [outcome(f"r{n}", [1.0] * 40, 10 * n, num_images=n + 3) for n in range(5, 30)]
    found = concordance(EPOCHS.score, runs, LEADING, (2, 3.3), draws=20)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    stepped = [replace(o, rows=[{**row, "train/optimizer_steps": row["images_seen"] / 4} for row in o.rows]) for o in runs]
    assert concordance(STEPS.score, stepped, LEADING, (2, 3.3), draws=0).value != 0.5


def test_every_rule_reads_what_it_says() -> None:
    keys = ("icr", "icr_rise_low", "view_error_ratio", "view_auc", "fisher_residual_energy", "alignment", "rankme")
    row = {f"repr/{key}": 0.7 for key in keys} | {"train/optimizer_steps": 3}
    losses = {"loss/train_eval": 0.4, "loss/heldout": 0.5}
    rows = [{"images_seen": 2 ** (i + 8)} | row | losses for i in range(6)]
    run = replace(outcome("a", [], None), rows=rows)
    for rule in RULES:
        without = replace(run, rows=[{key: v for key, v in r.items() if not key.startswith("loss/")} for r in rows])
        if rule.score(run):
            assert bool(rule.score(without)) is not rule.heldout, rule.name
    assert sum(bool(rule.score(run)) for rule in RULES) >= len(keys) + 3


def test_the_plan_is_its_design() -> None:
    assert PLAN.read_text() == text_of(design())


def test_any_first_part_of_the_plan_is_about_balanced() -> None:
    runs = read_plan().runs
    assert len({run.name for run in runs}) == len(runs) >= 110
    assert all(run.chosen_on is chosen_on(run.name) for run in runs)
    decoupled = [run for run in runs if run.factors["panel"] == "decoupled"]
    assert len(decoupled) >= 80
    for part in (decoupled[:24], decoupled[:48], decoupled):
        for factor in ("family", "dropout", "learning_rate", "batch_size", "width", "images"):
            counted = Counter(run.factors[factor] for run in part)
            levels = len({run.factors[factor] for run in decoupled})
            assert len(counted) == levels, factor
            assert max(counted.values()) <= 1.8 * len(part) / levels, (factor, counted)
            assert min(counted.values()) >= 0.4 * len(part) / levels, (factor, counted)
        assert 0.35 <= sum(run.chosen_on for run in part) / len(part) <= 0.65
    # Most are nearly as long as copies should take, in optimizer steps, and so end after quite different epochs.
    lengths = [run.options["total_kimg"] / kimg_needed(run.factors) for run in decoupled]
    assert sum(length >= 0.75 for length in lengths) > len(lengths) / 2
    # What it costs, by the speed of one core that its lengths are reckoned with.
    assert sum(map(cost_of, design()["runs"])) < 5 * 3600
    ends = sorted(1000 * run.options["total_kimg"] / run.factors["num_images"] for run in decoupled)
    assert ends[len(ends) * 9 // 10] > 4 * ends[len(ends) // 10]
    plan = read_plan()
    for run in plan.runs:
        unavailable = missing_feature(run, plan)
        assert unavailable is None or any(need in unavailable for need in run.needs), (run.name, unavailable)


def tiny_plan(**others: object) -> PlannedRun:
    options = {
        "data": "digits", "resolution": 8, "num_images": 24, "num_heldout": 16, "family": "edm", "block_channels": [8, 16],
        "batch_size": 8, "total_kimg": 0.64, "first_measurement_kimg": 0.32,
    }  # fmt: skip
    return PlannedRun("tiny", True, (), {"images": "digits8", "num_images": 24}, options, **others)  # type: ignore[arg-type]


@pytest.mark.usefixtures("few_errors")
def test_a_run_changes_midway_and_failures_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from studies.validation.training import train
    from trainers.train import Stop

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    plan = replace(read_plan(), monitor={"measurements": 3, "num_samples": 8, "sample_steps": 2, "encoder": "pixels"})
    run = tiny_plan(changes=({"at_kimg": 0.4, "batch_size": 16},))
    stop = Stop()
    path = train(run, plan, tmp_path / "work", tmp_path, stop)
    (result,) = read_results(tmp_path)
    assert path.stat().st_size < 20_000
    assert [row["images_seen"] for row in result.rows] == [0, 320, 464, 640]
    assert [row["train/batch_size"] for row in result.rows] == [8, 8, 16, 16]
    assert result.rows[-1]["train/optimizer_steps"] == 50 + 15
    assert result.params["feature_dim"] == 16
    assert not list(tmp_path.glob("work/tiny/checkpoints/*/state.safetensors"))
    unknown = replace(run, options={**run.options, "augmentt": "flip"})
    assert "augmentt" in (missing_feature(unknown, plan) or "")
    with pytest.raises(ValueError, match="run is 'nobody'; expected one of the"):
        select(plan, ["nobody"])


@pytest.mark.slow
@pytest.mark.usefixtures("few_errors")
def test_a_finished_run_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from studies.validation.remeasure import measured_anew
    from studies.validation.training import train
    from trainers.train import Stop

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    plan = replace(read_plan(), monitor={"measurements": 3, "num_samples": 8, "sample_steps": 2, "encoder": "pixels"})
    run = tiny_plan()
    train(run, plan, tmp_path / "work", tmp_path, Stop())
    (result,) = read_results(tmp_path)
    again = measured_anew(run, plan, tmp_path / "work" / "tiny", result)
    for before, after in zip(result.rows, again.rows, strict=True):
        assert before.keys() == {key for key in after if not key.startswith("perf/")}
        values = {key: after[key] for key in before if key.startswith("repr/")}
        assert {key: before[key] for key in values} == pytest.approx(values, rel=1e-4, abs=1e-6)
    with pytest.raises(ValueError, match="has no checkpoint, with which tiny began"):
        measured_anew(replace(run, before={}), plan, tmp_path / "work" / "tiny", result)


@pytest.mark.slow
def test_runs_are_trained_once_and_stopped_ones_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = read_plan()
    first = next(r for r in plan.runs if r.factors["images"] == "digits8" and not r.needs and r.factors["width"] <= 16)
    chosen = select(plan, [first.name])
    work, results = tmp_path / "work", tmp_path / "results"

    def stop_once_measured() -> None:
        history = work / first.name / "history.jsonl"
        while not history.exists() or history.read_text().count("\n") < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_once_measured, daemon=True)
    stopper.start()
    failures = train_missing(chosen, work, results, 1)
    assert len(failures) == 1
    assert failures[0].startswith(f"{first.name}: stopped; all of it is in ")
    rows = (work / first.name / "history.jsonl").read_text()
    assert train_missing(chosen, work, results, 1) == []
    (result,) = read_results(results)
    assert len(result.rows) > len(rows.splitlines()) > 1
    assert train_missing(chosen, work, results, 1) == []  # at once
    assert f"1/1 {first.name}" in capsys.readouterr().out


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


def made_up_results() -> list[Result]:
    """Results of some runs of the plan with made-up histories: some copy, some do not, one is disputed."""
    results = []
    for i, run in enumerate(read_plan().runs[:12]):
        copies, rows = i % 3 == 0, []
        for j in range(1, 13):
            repr_values = {"repr/view_error_ratio": 1 + j * j * copies / 10, "repr/icr": 0.5 + 0.01 * (j % 4)}
            mem = {"mem/ratio_l2": 0.1 * (copies and j > 9), "mem/ct": -5.0 * (i == 1 and j > 7), "mem/authpct": 40.0}
            others = {"loss/heldout": 1 / j, "loss/train_eval": 0.9 / j, "train/optimizer_steps": 4.0 * 2**j}
            rows.append({"images_seen": 100 * 2**j} | repr_values | mem | others)
        results.append(Result(run.name, run.factors, {}, rows))
    return results


def test_results_are_small_and_the_same_bytes(tmp_path: Path) -> None:
    result = Result("a", {"num_images": 64}, {"feature_dim": 16}, [{"images_seen": 123456789, "x": 1 / 3, "perf/y": 1.0}])
    first = write_result(tmp_path, result).read_bytes()
    assert write_result(tmp_path, result).read_bytes() == first
    (found,) = read_results(tmp_path)
    assert found.rows == [{"images_seen": 123456789, "x": 0.333333}]


def test_a_page_says_first_what_came_out(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    (docs / "images").mkdir(parents=True)
    shutil.copytree(ROOT / "docs" / "validation" / "runs", docs / "validation" / "runs")
    shutil.copy(ROOT / "docs" / "validation.template.md", docs)
    write_report(made_up_results(), read_plan(), docs)
    page = (docs / "validation.md").read_text()
    assert "{{" not in page
    count = len(read_plan().runs)
    first = f"**Nothing stands yet: 12 of {count} runs are trained. The verdict caught "
    assert page.splitlines()[2].startswith(first)
    assert "not measured" in page  # signals that these histories do not have are named
    lines = (docs / "validation" / "outcomes.csv").read_text().splitlines()
    assert len(lines) == 13
    assert "copies by two detectors" in lines[0]
    write_report([], read_plan(), docs)
    assert f"none of the {count} runs of the plan is trained" in (docs / "validation.md").read_text().splitlines()[2]


def test_the_page_says_what_the_result_files_hold(tmp_path: Path) -> None:
    """Written anew, `docs/validation.md` is the same text, so no number in it is anybody's memory."""
    docs = tmp_path / "docs"
    (docs / "images").mkdir(parents=True)
    shutil.copytree(ROOT / "docs" / "validation", docs / "validation")
    shutil.copy(ROOT / "docs" / "validation.template.md", docs)
    write_report(read_results(docs / "validation" / "results"), read_plan(), docs)
    for name in ("validation.md", "validation/outcomes.csv"):
        assert (docs / name).read_text() == (ROOT / "docs" / name).read_text(), name
    assert (docs / "images" / "validation.png").stat().st_size > 10_000


def test_forecasts_are_held_against_onsets() -> None:
    rows = [{"images_seen": 2**j, "repr/view_error_ratio": max(1.0, 2.0 ** (j - 4))} for j in range(14)]
    runs = [replace(outcome(f"r{onset}", [], onset), rows=rows) for onset in (128, 1024, 8192)]
    for last in (False, True):
        found = forecast_coverage(runs, last=last)
        assert found.runs == 3
        assert 0 <= found.held <= found.had_one <= 3
        assert len(found.ratios) == found.had_one
    # A forecast says what it says whenever copies come: the later they do, the smaller its share of the onset.
    first = forecast_coverage(runs, last=False)
    assert first.ratios == tuple(sorted(first.ratios, reverse=True))
    assert forecast_coverage([outcome("clean", [], None)], last=True).runs == 0

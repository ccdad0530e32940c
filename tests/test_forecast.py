"""The forecast against histories whose onset is known, and its intervals against fresh data sets."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mlflow_icr import VerdictTracker, verdict
from mlflow_icr.monitoring import Forecast, scaled_onset
from mlflow_icr.monitoring.evidence import RatioEvidence, Thresholds
from mlflow_icr.monitoring.forecast import TABLE, Forecaster, Level, calibration, table_text
from studies.validation.calibration import (
    HISTORIES,
    RESULTS,
    SHARE,
    calibrated,
    copying_runs,
    factors_of,
    levels_of,
    log_factor,
)
from studies.validation.runs import read_plan
from tests.test_verdict import Rows, geometric, of_ratio, samples

LEVELS = (0.8, (Level(2.0, 4.0, 2.0, 8.0, 20), Level(4.0, 2.0, 1.5, 3.0, 20)))


def forecasts(rows: Rows) -> list[Forecast]:
    ratio, forecaster, found = RatioEvidence(Thresholds()), Forecaster(LEVELS), []
    for row in rows:
        _, begins = ratio.add(row)
        forecaster.add(ratio, int(row["images_seen"]), begins)
        found.append(forecaster.forecast(True, False))
    return found


def test_it_speaks_from_the_highest_level_passed() -> None:
    """The ratio is x / 1000 from 1000 images seen on: it passes 2 at 2000 and 4 at 4000, between measurements."""
    steps = [0, 1000, 1500, 2500, 3500, 4500]
    found = forecasts(of_ratio(steps, np.maximum(np.array(steps), 1000) / 1000))
    assert [one.images_seen for one in found[:3]] == [None] * 3
    assert found[2].absent == "the error ratio has not passed 2 times its lowest"
    assert found[3].images_seen == pytest.approx(8000)
    assert (found[4].low, found[4].high) == (pytest.approx(4000), pytest.approx(16_000))
    assert (found[5].low, found[5].images_seen, found[5].high) == pytest.approx((6000, 8000, 12_000))
    assert found[5].text == (
        "Copying is expected near 8,000 images seen (6,000 to 12,000; 80% interval): the error ratio passed 4 times its lowest "
        "at 4,000."
    )
    assert found[5].values() == pytest.approx(
        {"forecast/images_seen": 8000, "forecast/images_seen_low": 6000, "forecast/images_seen_high": 12_000}
    )
    assert found[0].values() == {}


def test_it_is_absent_with_a_reason() -> None:
    steps = geometric(1000, 64_000, 3)
    late = forecasts(of_ratio(steps, 3 * np.array(steps) / 1000))[-1]
    assert late.absent == "training began before the first measurement, with an error ratio of 3.00"
    rows = of_ratio(steps, np.array(steps) / 1000)
    assert (
        verdict([rows[0], *rows[1:-1], rows[-1] | samples(ratio=0.3, ct=-4)]).forecast.absent == "samples already hold copies"
    )
    assert "No forecast of copying: there is no certain evidence of a turn." in verdict(rows[:1]).text
    assert verdict([]).forecast.text == "No forecast of copying: nothing was measured."
    past = forecasts(of_ratio([0, 1000, 4000, 100_000], np.array([1, 1, 4.0, 5.0])))[-1]
    assert past.text.endswith("; that step has passed, and no two detectors have found copies.")


def test_another_batch_size_counts_in_optimizer_steps() -> None:
    """Past 4 at the clock's 4000, an eighth of the batch: the other 4000 of the clock take 500 images."""
    rows = of_ratio([0, 1000, 4000, 4250], np.array([1, 1, 4.0, 4.5]))
    for row, steps, batch in zip(rows, (0, 10, 40, 60), (100, 100, 100, 12.5), strict=True):
        row |= {"train/optimizer_steps": steps, "train/batch_size": batch}
    found = forecasts(rows)[-1]
    assert found.images_seen == pytest.approx(4250 + 2000 / 8)
    assert (found.low, found.high) == pytest.approx((4250, 4250 + 6000 / 8))


def test_an_onset_scales_with_images_and_batch() -> None:
    assert scaled_onset(50_000, num_images=(128, 256)) == 100_000
    assert scaled_onset(50_000, num_images=(128, 128), batch_size=(64, 16)) == 12_500
    with pytest.raises(ValueError, match="num_images is 0; expected a positive number"):
        scaled_onset(50_000, num_images=(0, 128))


def test_intervals_hold_their_share_of_data_sets_that_were_not_seen() -> None:
    """Simulated: each data set has a centre of its own; 80 % of a fresh one's runs are to be inside, on average."""
    rng, inside = np.random.default_rng(0), []
    for _ in range(200):
        sets = [(rng.normal(0.7, 0.15) + 0.15 * rng.standard_normal(6)).tolist() for _ in range(7)]
        level = calibrated(4.0, {str(i): values for i, values in enumerate(sets[:-1])})
        assert level is not None
        inside += [level.low <= math.exp(value) <= level.high for value in sets[-1]]
    assert 0.75 < np.mean(inside) < 0.88
    by_hand = calibrated(2.0, {"a": [0.5, 0.6, 0.7], "b": [0.8, 0.9, 1.0]})
    # Residuals are 0.2, 0.3 and 0.4 of either set, from the other's median; of 6 the 6th is the ceil(7 x 0.8)-th.
    assert by_hand is not None
    assert np.log([by_hand.low, by_hand.factor, by_hand.high]) == pytest.approx([0.35, 0.75, 1.15], abs=1e-3)
    assert calibrated(2.0, {"a": [0.5] * 20, "b": []}) is None
    assert calibrated(2.0, {"a": [0.5], "b": [0.5]}) is None


def test_the_package_s_table_follows_from_its_runs() -> None:
    runs = json.loads(TABLE.read_text())["runs"]
    share, levels = calibration()
    assert (share, list(levels)) == (SHARE, levels_of(runs))
    assert TABLE.read_text() == table_text(SHARE, levels, runs)
    assert all(1 <= level.low <= level.factor <= level.high for level in levels)
    kept = {run["run"]: run for run in runs}
    histories = [run for run in copying_runs(RESULTS, HISTORIES) if run[0].count("-limited-")]
    assert all(factors_of(*run) == kept[run[0]] for run in histories[::6])
    unread = {run.name for run in read_plan().runs if not run.chosen_on}
    assert not unread & kept.keys()


def test_a_kept_run_is_foretold_before_it_copies() -> None:
    _, _, rows, onset = next(run for run in copying_runs(RESULTS, HISTORIES) if run[0] == "digits-limited-n128-seed1001")
    factor = log_factor(rows, 4.0, onset)
    assert factor is not None
    tracker = VerdictTracker()
    found = [tracker.add(row).forecast for row in rows if row["images_seen"] < onset]
    first = next(one for one in found if one.images_seen is not None)
    assert first.low is not None
    assert first.high is not None
    assert first.low < onset < first.high

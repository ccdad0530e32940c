"""The verdict on histories whose answer is known, and on real ones."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from mlflow_icr import VerdictTracker, verdict
from mlflow_icr.monitoring.evidence import SlopeWindow, Thresholds
from mlflow_icr.monitoring.series import read_history
from mlflow_icr.monitoring.verdict import folded, may_be_kept

STEPS = [0, *(round(2000 * 1.25**i) for i in range(18))]
TURN = 20_000
RUNS = Path(__file__).parents[1] / "docs" / "validation" / "runs"
Rows = list[dict[str, float]]


def history(early: float, late: float, icr_rise: float = 0.0, half_width: float = 0.05, wobble: float = 0.0) -> Rows:
    """View error ratio growing with one power of images seen up to TURN and with another after it; ICR falling, then rising."""
    rng = np.random.default_rng(3)
    rows, lowest = [], math.inf
    for step in STEPS:
        x = max(step, 1000)
        ratio = (min(x, TURN) / 1000) ** early * max(1.0, x / TURN) ** late * math.exp(wobble * rng.standard_normal())
        icr = 0.85 - 0.15 * min(1.0, math.log(x / 1000) / math.log(TURN / 1000)) + icr_rise * max(0.0, math.log(x / TURN))
        lowest = min(lowest, icr)
        rows.append(
            {
                "images_seen": step,
                "repr/icr": icr,
                "repr/icr_debiased": icr,
                "repr/icr_rise": icr - lowest,
                "repr/icr_rise_low": icr - lowest - 0.008,
                "repr/view_error_ratio": ratio,
                "repr/view_error_ratio_low": ratio * math.exp(-half_width),
                "repr/view_error_ratio_high": ratio * math.exp(half_width),
                "repr/trace_residual": 0.03 * max(1.0, x / TURN),
                "repr/trace_invariant": 0.02 * max(1.0, x / TURN) ** 0.3,
                "repr/fisher_residual_energy": 1e-5 * max(1.0, x / TURN) ** 2,
            }
        )
    return rows


def of_ratio(steps: list[int], ratios: np.ndarray, half_width: float = 0.05) -> Rows:
    """A history of nothing but the view error ratio."""
    names = ("repr/view_error_ratio", "repr/view_error_ratio_low", "repr/view_error_ratio_high")
    factors = np.exp([0, -half_width, half_width])
    return [
        {"images_seen": at, **dict(zip(names, (r * factors).tolist(), strict=True))}
        for at, r in zip(steps, ratios, strict=True)
    ]


def without(rows: Rows, *parts: str) -> Rows:
    return [{k: v for k, v in row.items() if not any(part in k for part in parts)} for row in rows]


def samples(ratio: float = 0.0, ct: float = 5.0, authentic: float = 98.0) -> dict[str, float]:
    return {"mem/ratio_l2": ratio, "mem/ct": ct, "mem/authpct": authentic}


def states(rows: Rows) -> list[str]:
    tracker = VerdictTracker()
    return [tracker.add(row).state for row in rows]


def alarm(rows: Rows) -> float | None:
    found = zip(rows, states(rows), strict=True)
    return next((row["images_seen"] for row, state in found if state in ("turning", "memorizing")), None)


def geometric(first: float, last: float, per_doubling: int) -> list[int]:
    return [round(first * 2 ** (i / per_doubling)) for i in range(round(per_doubling * math.log2(last / first)) + 1)]


def test_a_slope_is_least_squares_over_the_last_doubling() -> None:
    """Against numpy's fit of the same points, also after ten thousand rows of sums."""
    rng, window = np.random.default_rng(0), SlopeWindow(Thresholds())
    at = np.cumsum(rng.integers(50, 150, 10_000)) + 2000
    y, half = 0.4 * np.log(at) + 0.1 * rng.standard_normal(len(at)), rng.uniform(0.01, 0.1, len(at))
    for i in range(len(at)):
        slope = window.add(int(at[i]), float(at[i]), float(y[i]), float(half[i]))
        if i not in (100, 2000, 9999):
            continue
        assert slope is not None
        start = int(np.searchsorted(at, slope.since))
        assert at[start + 1] > at[i] / 2**0.99 >= at[start]
        x = np.log(at[start : i + 1])
        assert slope.value == pytest.approx(np.polyfit(x, y[start : i + 1], 1)[0], abs=1e-8)
        away = x - x.mean()
        reach = math.sqrt(float(((away * half[start : i + 1]) ** 2).sum())) / float(away @ away)
        assert (slope.low, slope.high) == pytest.approx((slope.value - reach, slope.value + reach), abs=1e-8)


def test_a_model_that_generalizes_and_one_that_turns() -> None:
    rich = verdict(history(0.25, 0.25, wobble=0.01))
    assert rich.state == "generalizing"
    assert (rich.turned_at, rich.low, rich.high, rich.wants_samples) == (None, None, None, False)
    assert rich.checkpoint_images_seen == STEPS[-1]
    assert "power 0.2" in rich.evidence[0]

    rows = history(0.3, 1.6)
    said = states(rows)
    assert said[:4] == ["undecided"] * 4
    turned = said.index("turning")
    assert set(said[5:turned]) <= {"generalizing", "undecided"}
    assert set(said[turned:]) == {"turning"}  # whatever the ratio, it takes samples to say more
    found = verdict(rows)
    assert found.low is not None
    assert found.turned_at is not None
    assert found.high is not None
    assert found.low <= TURN <= found.high
    assert found.low <= found.turned_at <= found.high <= TURN * 2
    assert found.checkpoint_images_seen == found.turned_at
    assert found.since == found.high == rows[turned]["images_seen"]
    # What later measurements say does not move a turn that holds.
    assert verdict(rows[: turned + 3]).turned_at == found.turned_at


def test_a_doubtful_turn_is_undecided() -> None:
    doubtful = verdict(history(0.3, 0.8, half_width=0.6))
    assert (doubtful.state, doubtful.wants_samples) == ("undecided", True)
    assert verdict(history(0.3, 0.8, half_width=0.02)).state == "turning"


@pytest.mark.parametrize("late_by", [10**6, 10**7])
def test_a_monitor_attached_late_says_the_same(late_by: int) -> None:
    """The limited histories kept here with as many images seen before: each measurement gets the state it had."""
    for folder in sorted(RUNS.glob("*-limited-*"))[::3]:
        rows = read_history(folder)
        shifted = [row | {"images_seen": row["images_seen"] + late_by} for row in rows]
        assert states(shifted) == states(rows), folder.name
        a, b = verdict(rows), verdict(shifted)
        assert a.state in ("turning", "memorizing")
        assert a.turned_at is not None
        assert (b.turned_at, b.origin) == (a.turned_at + late_by, late_by)
        # Without the measurement at which it was attached the clock starts a little later, and a turn is seen all the same.
        assert verdict(shifted[1:]).state == a.state, folder.name


@pytest.mark.parametrize(
    ("steps", "power", "start"),
    [
        (geometric(2000, 256_000, 1), 1.2, 1.0),  # one measurement a doubling
        (geometric(2000, 2_000_000, 3), 0.3, 12.0),  # slow growth from 12 to 95
        (geometric(2000, 128_000, 3), math.log(1.95 / 0.3) / math.log(64), 0.3),  # six-fold, and never above 2
    ],
)
def test_growth_that_no_single_doubling_shows_is_a_turn(steps: list[int], power: float, start: float) -> None:
    rows = of_ratio(steps, start * (np.array(steps) / 2000) ** power)
    found = verdict(rows)
    assert found.state == "turning"
    assert found.turned_at is not None
    assert found.low is not None
    assert found.low <= found.turned_at < steps[-1]


def test_rich_runs_that_go_on_are_not_accused_by_icrs_creep() -> None:
    """Those of 240 kimg go on to twice that as their last doubling did; ICR creeps as fast as in the fastest of them."""
    for folder in sorted(RUNS.glob("*-rich-*")):
        rows = read_history(folder)
        if rows[-1]["images_seen"] < 200_000:
            continue
        creeps = {}
        for key in ("repr/icr_debiased", "repr/view_error_ratio", "repr/trace_residual", "repr/trace_invariant"):
            (a, before), (b, now) = ((row["images_seen"], row[key]) for row in (rows[-5], rows[-1]))
            creeps[key] = now, (np.log(now) - np.log(before)) / math.log(b / a)
        lowest = min(row["repr/icr_debiased"] for row in rows)
        for i in range(1, 7):
            passed = 2 ** (i / 6)
            row = {key: now * passed ** min(rate, 0.35) for key, (now, rate) in creeps.items()}
            row["repr/icr_debiased"] = creeps["repr/icr_debiased"][0] + 0.03 * math.log(passed)
            rise = row["repr/icr_debiased"] - lowest
            ratio = row["repr/view_error_ratio"]
            row |= {"repr/icr_rise": rise, "repr/icr_rise_low": rise - 0.01}
            row |= {"repr/view_error_ratio_low": ratio * 0.95, "repr/view_error_ratio_high": ratio * 1.05}
            rows.append({"images_seen": round(rows[len(rows) - i]["images_seen"] * passed), **row})
        assert set(states(rows)) <= {"generalizing", "undecided"}, folder.name
        assert verdict(rows).state == "generalizing", folder.name


def test_another_batch_size_is_no_turn() -> None:
    """A rich run whose batch is divided by 8 at 256 kimg: its ratio is a power of optimizer steps all along."""
    steps = geometric(8000, 256_000, 4)
    changed = steps[-1]
    steps += [changed + d for d in geometric(2000, 800_000, 4)]
    taken = [at / 64 if at <= changed else changed / 64 + (at - changed) / 8 for at in steps]
    rows = of_ratio(steps, (np.array(taken) / taken[0]) ** 0.22)
    for row, count in zip(rows, taken, strict=True):
        after = row["images_seen"] > changed
        row |= {"train/batch_size": 8 if after else 64, "train/optimizer_steps": round(count)}
        row |= {"train/origin_images_seen": changed} if after else {}
    assert set(states(rows)[5:]) == {"generalizing"}
    told_less = without(rows, "optimizer_steps")  # then steps are images by the batch size
    assert set(states(told_less)[5:]) == {"generalizing"}
    by_images = without(rows, "train/")
    assert "turning" in states(by_images)  # what the clock is for
    # Of other data everything begins anew; what was found before is of the old ones.
    anew = [row | {"train/batch_size": 64} for row in rows]
    assert verdict(anew).origin == next(row["images_seen"] for row in rows if row["images_seen"] > changed)


def test_a_turn_clears_and_says_since_when() -> None:
    steps = geometric(2000, 2_000_000, 3)
    x = np.array(steps)
    ratio = np.where(x < 20_000, 1.0, np.minimum((x / 20_000) ** 1.6, 12.0))
    ratio[x > 100_000] = 1.3
    rows = of_ratio(steps, ratio)
    said = states(rows)
    assert "turning" in said
    found = verdict(rows)
    assert found.state == "generalizing"
    assert found.turned_at is not None
    assert found.cleared_at is not None
    assert 10_000 < found.turned_at < 50_000 < 100_000 < found.cleared_at < 400_000
    assert found.since is not None
    assert found.since >= found.cleared_at
    assert found.checkpoint_images_seen == steps[-1]
    assert f"cleared at {found.cleared_at:,}" in found.text
    assert found.summary()["cleared_at_images_seen"] == found.cleared_at
    # It may turn again.
    more = [at for at in geometric(2_000_000, 16_000_000, 3) if at > 2_000_000]
    again = verdict([*rows, *of_ratio(more, 1.3 * (np.array(more) / 2_000_000) ** 2)])
    assert (again.state, again.cleared_at) == ("turning", None)
    assert again.turned_at is not None
    assert again.turned_at >= 2_000_000


def test_missing_evidence_never_acquits() -> None:
    flat = without(history(0.25, 0.25), "view_error")
    found = verdict(flat)
    assert (found.state, found.wants_samples) == ("undecided", True)  # ICR falls: it did in runs that copied, too
    rows = history(0.25, 0.25)
    gap = [*rows[:-1], {k: v for k, v in rows[-1].items() if "view_error" not in k}]
    assert states(gap)[-2:] == ["generalizing", "undecided"]
    assert verdict([{"images_seen": s, "repr/view_error_ratio": math.nan} for s in STEPS]).state == "undecided"
    assert verdict([]).checkpoint_images_seen is None
    assert verdict([]).state == "undecided"


def near_views_alone(excess: list[float], half_width: float = 0.02) -> Rows:
    """A history of near views, whose ratio hardly moves, at steps a factor of 1.3 apart."""
    rows = []
    for i, value in enumerate(excess):
        ratio = 1 + 0.14 * max(0.0, value)
        ends = {f"repr/{n}_{end}": v + sign * half_width for n, v in (("view_excess", value), ("near_error_ratio", ratio))
                for end, sign in (("low", -1), ("high", 1))}  # fmt: skip
        same = {"repr/view_excess": value, "repr/near_error_ratio": ratio, "repr/view_error_ratio": ratio}
        rows.append({"images_seen": round(500 * 1.3**i), **same, **ends})
    return rows


def test_near_views_alone_convict_by_the_way_that_is_taken_back() -> None:
    # 64 images of CIFAR-10, which were copied from the 14th measurement on; 1600 digits, of which none was.
    copying = [-0.01, -0.02, -0.02, -0.02, -0.02, -0.02, -0.01, -0.01, 0.02, 0.08, 0.18, 0.32, 0.46, 0.57, 0.65]
    clean = [0.0, 0.01, 0.02, 0.04, 0.07, 0.1, 0.12, 0.13, 0.14, 0.15, 0.16, 0.16, 0.17, 0.18, 0.19]
    assert states(near_views_alone(copying)) == ["undecided"] * 3 + ["generalizing"] * 8 + ["turning"] * 4
    assert states(near_views_alone(clean)) == ["undecided"] * 3 + ["generalizing"] * 12
    found = verdict(near_views_alone(copying))
    assert (found.turned_at, found.low) == (round(500 * 1.3**11), round(500 * 1.3**10))
    assert "65% (63% to 67%) of the way back" in found.text
    assert states(near_views_alone(copying, 0.2))[11] == "undecided"
    # It clears; and far views, once there, are what is read.
    assert states(near_views_alone([*copying, 0.05, 0.05, 0.05]))[-3:] == ["turning", "turning", "generalizing"]
    both = [row | {f"repr/far_error_ratio{end}": 1.0 for end in ("", "_low", "_high")} for row in near_views_alone(copying)]
    assert "turning" not in states(both)


def test_icr_alone_accuses_where_the_ratio_is_missing_and_it_rises_far() -> None:
    rows = without(history(0.3, 1.6, icr_rise=0.12), "view_error")
    found = verdict(rows)
    assert found.state == "turning"
    lowest = min(rows[1:], key=lambda row: row["repr/icr_debiased"])["images_seen"]
    assert found.turned_at == found.low == lowest
    assert verdict(without(history(0.3, 1.6, icr_rise=0.04), "view_error")).state == "undecided"
    # An ICR that rises while the invariant energy keeps up is not a turn.
    assert verdict([row | {"repr/trace_invariant": row["repr/trace_residual"]} for row in rows]).state == "undecided"
    # Without intervals a rise must last; with wide ones it is in doubt.
    plain = without(rows, "debiased", "rise")
    assert verdict(plain).state == "turning"
    assert verdict(plain).evidence[0].startswith("ICR (plug-in)")
    for doubt in (
        [row | {"repr/icr_rise_low": -0.01} for row in rows],
        [row | {"repr/icr_low": row["repr/icr"] - 0.2, "repr/icr_high": row["repr/icr"] + 0.2} for row in plain],
    ):
        assert verdict(doubt).state == "undecided"


def test_memorizing_takes_two_detectors() -> None:
    rows, calm = history(0.3, 1.6), history(0.25, 0.25)

    def state(rows: Rows, **found: float) -> str:
        return verdict([*rows[:-1], rows[-1] | samples(**found)]).state

    assert state(rows) == "turning"  # a high ratio is not a copy
    assert state(rows, ratio=0.3) == "turning"  # nor is one detector two
    assert state(rows, ratio=0.3, authentic=10) == "memorizing"
    assert state(rows, ct=-5.8, authentic=12) == "memorizing"
    # Where errors say nothing, a direct detector must be among them: smooth samples are near everything.
    assert state(calm, ct=-5.8, authentic=12) == "undecided"
    assert state(calm, ratio=0.3, ct=-4) == "memorizing"
    assert state(calm, ct=-4) == "undecided"
    assert state(calm) == "generalizing"
    # Similarity counts beyond what the training images' own duplicates explain.
    similar = {"mem/copies_sscd": 0.2, "mem/copies_sscd_train": 0.0, "mem/copies_sscd_low": 0.1}
    assert verdict([*rows[:-1], rows[-1] | samples(authentic=10) | similar]).state == "memorizing"
    assert (
        verdict([*rows[:-1], rows[-1] | samples(authentic=10) | similar | {"mem/copies_sscd_train": 0.19}]).state == "turning"
    )
    # Of copies that errors did not foresee the turn is dated between the last two looks at samples.
    looks = [row | (samples() if i == 8 else samples(ratio=0.3, ct=-4) if i == 14 else {}) for i, row in enumerate(calm)]
    found = verdict(looks)
    assert (found.turned_at, found.low, found.high) == (STEPS[8], STEPS[8], STEPS[14])
    # A look that was taken for the verdict comes after the rest of its row.
    tracker = folded(rows)
    assert tracker.verdict.wants_samples
    assert tracker.add_samples({"images_seen": STEPS[-1], **samples(ratio=0.3, ct=-4)}).state == "memorizing"
    with pytest.raises(ValueError, match=f"images_seen is 5; expected {STEPS[-1]}, the last row's"):
        tracker.add_samples({"images_seen": 5})
    with pytest.raises(ValueError, match=f"images_seen is 5; expected more than {STEPS[-1]}"):
        tracker.add({"images_seen": 5})


def test_a_row_costs_the_same_however_long_the_history() -> None:
    """In Python calls, which a busy machine does not change, and in what is kept of past rows."""
    tracker, steps = VerdictTracker(), list(range(0, 3000 * 64, 64))
    rows = of_ratio(steps, 1 + 0.3 * np.log1p(np.arange(len(steps))) / 12)
    calls = [0]

    def count(frame: object, event: str, argument: object) -> None:
        calls[0] += event in ("call", "c_call")

    def cost(part: Rows) -> int:
        calls[0] = 0
        sys.setprofile(count)
        for row in part:
            tracker.add(row)
        sys.setprofile(None)
        return calls[0]

    cost(rows[:100])
    early = cost(rows[100:200])
    cost(rows[200:-100])
    assert abs(cost(rows[-100:]) - early) < 0.05 * early


def test_rows_fold_in_any_order_and_what_may_be_kept_is_foreseen() -> None:
    rows = history(0.3, 1.6)
    assert verdict([*rows[5:], *rows[:5], rows[7]]) == verdict(rows)
    assert verdict(rows, Thresholds(elasticity=5, level=1000, absolute_level=1000)).state == "generalizing"
    tracker, before = VerdictTracker(), set[int]()
    for row in rows:
        kept = tracker.add(row).checkpoint_images_seen
        assert kept in before | {row["images_seen"]}
        before = tracker.may_be_kept
        assert len(before) <= 3
    assert before == may_be_kept(rows)

"""What the validation study was to show, beside made-up outcomes that are counted by hand."""

from __future__ import annotations

import pytest

from studies.validation import goals as module
from studies.validation.goals import goals, headline
from studies.validation.outcomes import LEADING, TWO, Outcome
from studies.validation.rivals import EPOCHS
from studies.validation.runs import read_plan


def run(name: str, images: str, onset: int | None, two: int | None = None) -> Outcome:
    rows = [{"images_seen": at} for at in (100, 200, 400, 800)]
    return Outcome(name, {"images": images, "num_images": 100}, False, rows, {LEADING: onset, TWO: two})


RUNS = [
    run("grey early", "digits8", 400, 400),  # alarm at .25
    run("grey late", "mnist8", 800, 400),  # alarm at the second detector's onset
    run("colour", "cifar8", 800),  # alarm at .5
    *(run(f"clean {i}", "digits8", None) for i in range(20)),  # one has an alarm
]
ALARMS = {"grey early": 100, "grey late": 400, "colour": 400, "clean 0": 100}


@pytest.fixture(autouse=True)
def _known_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "alarms_of", lambda rule, runs: {o.name: ALARMS.get(o.name) for o in runs})


def test_goals_are_counted_and_held_against_their_bounds() -> None:
    results = {goal.text: goal for goal in goals(RUNS, [EPOCHS], read_plan())}
    caught, second, accused, grey, colour, memorizing, forecast = results.values()
    assert (caught.outcome[:6], caught.met) == ("3 of 3", True)
    assert (second.outcome[:6], second.met) == ("1 of 2", False)
    assert (accused.outcome[:7], accused.met) == ("1 of 20", True)  # 5 % is what is allowed
    assert (grey.outcome, grey.met) == ("0.38 (0.31 to 0.44)", True)  # of .25 and .5
    assert (colour.outcome, colour.met) == ("0.50", True)
    assert (memorizing.outcome, memorizing.met) == ("-", None)  # no verdict without measurements
    assert (forecast.outcome, forecast.met) == ("-", None)
    ALARMS["clean 1"] = 100
    try:
        assert not goals(RUNS, [EPOCHS], read_plan())[2].met  # 10 % is more
    finally:
        del ALARMS["clean 1"]


def test_the_first_lines_name_what_was_missed() -> None:
    lines = headline(RUNS, RUNS, [EPOCHS], read_plan()).splitlines()
    assert "The verdict caught 3 of 3 copying runs before their copies" in lines[0]
    assert "it accused 1 of 20 clean runs" in lines[0]
    assert lines[0].startswith(f"**Nothing stands yet: {len(RUNS)} of {len(read_plan().runs)} runs are trained.")
    assert lines[-1].endswith("`grey late` (alarm at 4, copies from 4 epochs on).")

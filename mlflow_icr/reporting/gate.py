"""The gate of a release: whether a run may pass, by the copies among its samples and its verdict. Nothing unmeasured passes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from mlflow_icr.monitoring.verdict import GENERALIZING, MEMORIZING, TURNING, UNDECIDED
from mlflow_icr.reporting.material import RunMaterial

STATES = (GENERALIZING, TURNING, MEMORIZING)
# The criterion of a report's page.
MAX_COPIES, FORBIDDEN = 0.01, (MEMORIZING,)
# Detectors whose values are shares of samples.
SHARES = re.compile(r"mem/(ratio|copies)_.+|mem/carlini")
LEVEL = 0.95  # of the intervals that measurements have


@dataclass(frozen=True)
class Gate:
    """Whether a run passes, and the reasons; for a run that fails, only those against it."""

    passed: bool
    reasons: tuple[str, ...]

    @property
    def text(self) -> str:
        """The outcome and its reasons in one line."""
        return f"{'passes' if self.passed else 'fails'}: {'; '.join(self.reasons)}"


def gate(run: RunMaterial, max_copies: float | None = None, forbid: Collection[str] = ()) -> Gate:
    """Judge a run at its newest measurement.

    With `max_copies`, a share, the interval of each detector's share of copies has to lie at or below it. With `forbid`, the
    verdict must be none of these states, and not undecided. Raises ValueError for an impossible share or state, or for
    neither.
    """
    if max_copies is None and not forbid:
        raise ValueError("max_copies and forbid are not given; expected one of them at least")
    if max_copies is not None and not 0 < max_copies <= 1:
        raise ValueError(f"max_copies is {max_copies}; expected a share above 0 and at most 1")
    for state in forbid:
        if state not in STATES:
            raise ValueError(f"forbid is {state!r}; expected some of {', '.join(STATES)}")
    against: list[str] = []
    speaking_for: list[str] = []
    if max_copies is not None:
        passes, reason = _copies(run, max_copies)
        (speaking_for if passes else against).append(reason)
    if forbid:
        state = run.verdict.state
        (against if state in forbid or state == UNDECIDED else speaking_for).append(_verdict_text(run))
    return Gate(not against, tuple(against or speaking_for))


def _verdict_text(run: RunMaterial) -> str:
    why = next(iter(run.verdict.evidence), "nothing was measured")
    return f"the verdict is {run.verdict.state} ({why})"


def _copies(run: RunMaterial, most: float) -> tuple[bool, str]:
    """Whether copies are surely few enough, and why or why not."""
    keys = [key for key in run.keys if SHARES.fullmatch(key) and {f"{key}_low", f"{key}_high"} <= set(run.keys)]
    if not keys:
        reasons = [text for key, text in sorted(run.noted("absent").items()) if SHARES.fullmatch(key)]
        why = reasons[0] if reasons else "no samples were drawn"
        return False, f"copies were not measured ({why})"
    newest = int(run.rows[-1]["images_seen"])
    shares: list[tuple[float, float, str]] = []
    for key in keys:
        step, value = run.of(key)[-1]
        bounds = run.bounds(key, step)
        if step != newest or bounds is None:
            return False, f"copies ({key}) were last measured at {step:,} images seen, and the run has reached {newest:,}"
        shares.append((bounds[1], value, key))
    high, value, key = max(shares)
    shown, bound, allowed = (f"{100 * share:.3g} %" for share in (value, high, most))
    text = f"{key} is {shown} of samples, with an interval up to {bound}, and at most {allowed} is allowed"
    if high <= most or value > 0:
        return high <= most, text
    return False, f"{text}: {_samples_needed(most):,} samples without a copy would be enough"


def _samples_needed(most: float) -> int:
    """The number of samples without a copy whose exact interval ends at `most`: (1 - most)^n = (1 - LEVEL) / 2."""
    return math.ceil(math.log((1 - LEVEL) / 2) / math.log1p(-most))

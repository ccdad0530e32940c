"""When to measure."""

from __future__ import annotations

from collections.abc import Sequence


def geometric_schedule(total: int, *, first: int, count: int, granularity: int = 1) -> tuple[int, ...]:
    """Images seen at which to measure: 0, then `count` points in geometric progression from `first` to `total`.

    Learning is fast at first and slow later: equal ratios give each stage the same share of measurements. Points are
    rounded up to whole multiples of `granularity` (the batch), and equal ones merged; the last is the end of the training,
    `total` rounded up. Raises ValueError unless 1 <= first <= total, count >= 2 and granularity >= 1.
    """
    if not 1 <= first <= total:
        raise ValueError(f"first is {first}; expected 1 to {total}, the total")
    if count < 2:
        raise ValueError(f"count is {count}; expected at least 2")
    if granularity < 1:
        raise ValueError(f"granularity is {granularity}; expected at least 1")
    points = (first * (total / first) ** (i / (count - 1)) for i in range(count))
    return tuple(sorted({0} | {-(-round(p) // granularity) * granularity for p in points}))


def every_nth(points: Sequence[int], n: int) -> tuple[int, ...]:
    """The last of increasing points and every n-th before it: a sparser schedule that keeps the end.

    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1")
    return tuple(points[::-1][::n][::-1])

"""When to measure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, pairwise

# The verdict reads slopes over doublings of images seen, which need three measurements: this gives them four.
PER_DOUBLING = 3
SUSPICION = "suspicion"  # when to look at samples: where the verdict is not that the model generalizes
FIRST_IMAGES = 2000  # earlier, a network has learned too little to measure


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
    """Every n-th of increasing points, counted from the last: a sparser schedule that keeps the end.

    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1")
    return tuple(points[::-1][::n][::-1])


def looks_every(text: str | int) -> int | None:
    """The number of measurements for one look at samples; None: samples are looked at on suspicion.

    Raises ValueError unless it is a whole number >= 1, or "suspicion".
    """
    if text == SUSPICION:
        return None
    if not str(text).isdecimal() or int(text) < 1:
        raise ValueError(f"generate_every is {text!r}; expected a whole number >= 1, or {SUSPICION}")
    return int(text)


def measuring_steps(schedule: int | Iterable[int] | None = None) -> Iterator[int]:
    """Images seen at which to measure, ascending: multiples of a number, given numbers, or a geometric progression.

    None is for trainings whose end is not known: 0, 2000, and then three in each doubling, without end. Raises ValueError
    for numbers that are not positive, or do not increase.
    """
    if schedule is None:
        return (0 if i == 0 else round(FIRST_IMAGES * 2 ** ((i - 1) / PER_DOUBLING)) for i in count())
    if isinstance(schedule, int):
        if schedule < 1:
            raise ValueError(f"schedule is {schedule}; expected a number of images >= 1, or several")
        return count(0, schedule)
    points = list(schedule)
    if not points or points[0] < 0 or any(b <= a for a, b in pairwise(points)):
        raise ValueError(f"schedule is {points}; expected increasing numbers of images seen, >= 0")
    return iter(points)

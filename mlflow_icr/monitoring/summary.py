"""A history in a few numbers that a run table can be sorted by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mlflow_icr.monitoring.series import series

# A ratio this small is within the noise of a few hundred samples, and within what near-duplicates in a data set cause.
ONSET_RATIO = 0.05
# The keys of a run's summary, from `summarise` and from its verdict.
SUMMARY_KEYS = frozenset(
    (
        *("icr_min", "icr_min_images_seen", "mem_onset_images_seen", "lead_images"),
        *("turned_at_images_seen", "turned_at_images_seen_low", "turned_at_images_seen_high", "cleared_at_images_seen"),
        *("checkpoint_images_seen", "forecast/images_seen", "forecast/images_seen_low", "forecast/images_seen_high"),
    )
)


def summarise(history: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """`icr_min` and `icr_min_images_seen`, `mem_onset_images_seen`, and `lead_images` from the first to the second.

    The onset is the first measurement from which `mem/ratio_l2` stays above 0.05 to the end. What a history does not have
    (no onset yet, no ICR, a lowest ICR after the onset) is absent from the result.
    """
    rows = list(history)
    result: dict[str, float] = {}
    icr = series(rows, "repr/icr")
    if icr:
        at, lowest = min(icr, key=lambda point: (point[1], point[0]))
        result["icr_min"] = lowest
        result["icr_min_images_seen"] = at
    onset = None
    for at, ratio in reversed(series(rows, "mem/ratio_l2")):
        if ratio <= ONSET_RATIO:
            break
        onset = at
    if onset is not None:
        result["mem_onset_images_seen"] = onset
        if icr and onset > result["icr_min_images_seen"]:  # an ICR that still falls gives no lead
            result["lead_images"] = onset - result["icr_min_images_seen"]
    return result

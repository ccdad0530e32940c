"""The first group of TensorBoard's pages: ICR, copies, the error ratio that the verdict reads, and residual energy.

TensorBoard orders charts and texts by their tags, capitals first, and opens the first group. Values of these keys are therefore
shown twice, under their own tag and in the group `Answer`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mlflow_icr.monitoring.evidence import EXCESS, NEAR, RATIOS
from mlflow_icr.monitoring.summary import SUMMARY_KEYS

GROUP = "Answer/"
# Of the keys, the first that a row has.
ANSWERS = {
    f"{GROUP}ICR": ("repr/icr_debiased", "repr/icr"),
    f"{GROUP}copies": ("mem/ratio_l2",),
    f"{GROUP}error ratio": RATIOS,
    f"{GROUP}residual energy": ("repr/fisher_residual_energy",),
}
VIEW_EXCESS = f"{GROUP}view excess"  # in place of the ratio if there are near views alone: the verdict reads it then
VERDICT = f"{GROUP}verdict"  # a text
SUMMARY_GROUP = "summary/"  # values of the whole run, one point each; the name sorts behind all curves


def answer_keys(keys: Collection[str]) -> dict[str, str]:
    """Of the given keys, those in the group `Answer`, with their tags there."""
    keys_by_tag = {tag: next((key for key in choices if key in keys), None) for tag, choices in ANSWERS.items()}
    if RATIOS[0] not in keys and NEAR in keys:
        keys_by_tag |= {f"{GROUP}error ratio": None, VIEW_EXCESS: EXCESS if EXCESS in keys else None}
    return {key: tag for tag, key in keys_by_tag.items() if key is not None}


def answers(values: Mapping[str, float]) -> dict[str, float]:
    """The values of the group `Answer`, by tag, of a row of a history."""
    return {tag: values[key] for key, tag in answer_keys(values).items()}


def summary_tag(key: str) -> str:
    """The tag of a value of the run's summary."""
    return SUMMARY_GROUP + key


def key_of(tag: str) -> str:
    """The key of a tag: without `summary/` if this package wrote it."""
    key = tag.removeprefix(SUMMARY_GROUP)
    return key if key in SUMMARY_KEYS else tag

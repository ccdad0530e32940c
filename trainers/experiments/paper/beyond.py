"""Statements on what the paper does not have: the turn in latents, and which images are copied first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trainers.experiments.paper.claims import Claim, Results, Rows, Vote, judged_claim, turn_claim
from trainers.experiments.paper.origins import auc, earliness, rank_correlation
from trainers.experiments.paper.plan import DUPLICATES, EDM_FEW, LATENT_FEW, REPEATED, TIMES

LATENTS, OUTLIERS, REPEATS = "latents", "outliers", "duplicates"


def _side(low: float, high: float, middle: float) -> bool | None:
    """Whether an interval lies above a value; None where it contains the value."""
    return True if low > middle else False if high < middle else None


def _outliers_vote(rows: Rows) -> Vote | None:
    estimate = rank_correlation(np.array([row["to_others"] for row in rows]), earliness(rows))
    if estimate is None:
        return None
    turned = sum(row["turned"] is not None for row in rows)
    note = f"Spearman {estimate[0]:.2f} [{estimate[1]:.2f}, {estimate[2]:.2f}], {turned} of {len(rows)} turned"
    copied = rank_correlation(*(np.array([row[key] for row in rows], dtype=float) for key in ("to_others", "copies")))
    if copied is not None:  # known first is not copied most
        note += f"; of the distance and the copies at the end {copied[0]:.2f} [{copied[1]:.2f}, {copied[2]:.2f}]"
    return _side(*estimate[1:], 0.0), note


def outliers_claim(results: Results) -> Claim:
    """Images far from the others are copied first."""
    rule = (
        "on every seed: Spearman's correlation of an image's mean distance to its five nearest and of how early its own error "
        "ratio passes 1.5 for good, its 95 % interval (Fisher's transformation) above 0; below 0 it disagrees"
    )
    return judged_claim(results, OUTLIERS, "Outliers are known by heart first", rule, {EDM_FEW: _outliers_vote}, "origins")


def _repeats_vote(rows: Rows) -> Vote | None:
    repeated, early = np.array([row["times"] > 1 for row in rows]), earliness(rows)
    if not repeated.any() or repeated.all():
        return None
    value, low, high = auc(early[repeated], early[~repeated])
    copies = np.array([row["copies"] for row in rows])
    note = (
        f"P(a repeated image turns before a single one) {value:.2f} [{low:.2f}, {high:.2f}]; "
        f"{copies[repeated].sum()} of {copies.sum()} copies are of the {repeated.sum()} repeated of {len(rows)} images"
    )
    return _side(low, high, 0.5), note


def repeats_claim(results: Results) -> Claim:
    """Images that are in the training set several times are copied first."""
    rule = (
        "P(a repeated image's own error ratio passes 1.5 for good before a single image's), ties count half, its 95 % interval "
        "(Newcombe 2006, method 5) above 0.5; below it disagrees"
    )
    text = f"Of {REPEATED} images that are there {TIMES} times each, copies come first"
    return judged_claim(results, REPEATS, text, rule, {DUPLICATES: _repeats_vote}, "origins")


def latents_claim(results: Results) -> Claim:
    """The turn in latents; its numbers also have copies of the training images as the autoencoder decodes them."""
    claim = turn_claim(results, LATENTS, LATENT_FEW, "EDM in latents")
    ends = [r["trajectory"][-1] for r in results.values() if r["role"] == LATENT_FEW and r["trajectory"]]
    decoded = [f"{row['copies_decoded']:.2f}" for row in ends if row.get("copies_decoded") is not None]
    note = f"; of decoded training images {', '.join(decoded)}" if decoded else ""
    return replace(claim, numbers=claim.numbers + note)


def beyond_claims(results: Results) -> list[Claim]:
    """The statements on latents, outliers and duplicates."""
    return [latents_claim(results), outliers_claim(results), repeats_claim(results)]

"""The page: thirteen figures with thirteen statements and the paper's readings, the same bytes from the same results."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from trainers.experiments.paper.claims import AGREES, DISAGREES, UNDECIDED, Claim, Results, all_claims
from trainers.experiments.paper.figures import FIGURES
from trainers.experiments.paper.plan import Scale
from trainers.experiments.paper.readings import READINGS


def _summary(claims: Sequence[Claim], scale: Scale, results: Results) -> list[str]:
    counts = Counter(claim.outcome for claim in claims)
    planned = len(scale.trainings())
    said = ", ".join(f"{counts[word]} {word}" for word in (AGREES, DISAGREES, UNDECIDED) if counts[word])
    lines = [f"At scale `{scale.name}`, of {len(claims)} claims: {said or 'none is measured yet'}."]
    lines.append(f"{len(results)} of {planned} trainings are measured.")
    if len(results) < planned:
        lines.append("**This page is partial**: the same command goes on where it stopped.")
    return lines


def page_text(claims: Sequence[Claim], scale: Scale, results: Results) -> str:
    """The page as Markdown."""
    lines = ["# The paper, reproduced", "", *_summary(claims, scale, results), ""]
    lines += [
        "Written by `mlflow run . -e paper`, from result files. The paper is Li, Jia, et al., ICML 2026, arXiv 2606.09718."
    ]
    lines += ["The scale is not the paper's: shapes and orders can be compared, values cannot.", ""]
    lines += ["| figure | claim | outcome |", "|---|---|---|"]
    lines += [f"| [{claim.figure}](#figure-{claim.figure}) | {claim.claim} | **{claim.outcome}** |" for claim in claims]
    for claim in claims:
        lines += ["", f"## Figure {claim.figure}", "", f"{claim.claim}: **{claim.outcome}**.", ""]
        lines += [f"![Figure {claim.figure}](figure-{claim.figure:02d}.png)", "", "| | |", "|---|---|"]
        lines += [
            f"| here | {claim.numbers or 'not measured'} |",
            f"| paper | {READINGS[claim.figure]} |",
            f"| rule | {claim.rule} |",
        ]
        if claim.figure == 6:
            for what, name in _pictures(results).items():
                lines += ["", f"Each row an image and its nearest by the invariant part, {what}:", "", f"![{what}]({name})"]
    return "\n".join(lines) + "\n"


def _pictures(results: Results) -> dict[str, str]:
    """Names on the page of the pictures of neighbours, by what they are."""
    shown: dict[str, str] = next((result["neighbours"] for result in results.values() if result.get("neighbours")), {})
    return {what: f"figure-06-{what.split()[0]}.png" for what in shown}


def write_page(scale: Scale, results: Results, place: Path, figures: Sequence[int], pictures: Path) -> list[Claim]:
    """Write figures, `claims.json` and `index.md` to a folder; returns the statements. `pictures` is the results' folder."""
    place.mkdir(parents=True, exist_ok=True)
    claims = all_claims(results)
    for number in figures:
        # Without the library's version and the time, which would change the file's bytes.
        FIGURES[number](results).savefig(place / f"figure-{number:02d}.png", dpi=110, metadata={"Software": None})
    for result in results.values():
        for what, path in result.get("neighbours", {}).items():
            shutil.copyfile(pictures / path, place / _pictures(results)[what])
    plain = [{"figure": c.figure, "claim": c.claim, "outcome": c.outcome, "numbers": c.numbers} for c in claims]
    (place / "claims.json").write_text(json.dumps(plain, indent=1) + "\n")
    (place / "index.md").write_text(page_text(claims, scale, results))
    return claims

"""The page: thirteen figures with thirteen statements and the paper's readings, the same bytes from the same results."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.experiments.paper.beyond import LATENTS, OUTLIERS, REPEATS, beyond_claims
from trainers.experiments.paper.claims import AGREES, DISAGREES, UNDECIDED, Claim, Results, all_claims
from trainers.experiments.paper.figures import BEYOND, FIGURES
from trainers.experiments.paper.image_pages import LISTED, page_name, ranks, write_image_pages
from trainers.experiments.paper.origins import likeliest
from trainers.experiments.paper.plan import DUPLICATES, EDM_FEW, Scale
from trainers.experiments.paper.readings import READINGS
from trainers.experiments.paper.tried import tried

HEADINGS = {
    LATENTS: "In latents",
    OUTLIERS: "Where copies come from: outliers",
    REPEATS: "Where copies come from: repeated images",
}
ORDER = ("before", "at", "after")


def _summary(claims: Sequence[Claim], scale: Scale, results: Results) -> list[str]:
    counts = Counter(claim.outcome for claim in claims)
    planned = len(scale.trainings())
    outcomes = ", ".join(f"{word} {counts[word]}" for word in (AGREES, DISAGREES, UNDECIDED) if counts[word])
    lines = [f"At scale `{scale.name}`, of {len(claims)} claims: {outcomes or 'none is measured yet'}."]
    lines.append(f"{len(results)} of {planned} trainings are measured.")
    missing = [training.name for training in scale.trainings() if training.name not in results]
    if missing:
        lines.append(f"**This page is partial**, without {', '.join(missing)}: the same command continues where it stopped.")
    return lines


def _setting(scale: Scale) -> list[str]:
    """The trainings of this scale, in words."""
    side = scale.common["resolution"]
    others = "" if scale.flow_few is None else f", {scale.flow_few} for the transformer"
    return [
        f"CIFAR-10 at {side}x{side}: {scale.few} images (few{others}) for {scale.few_kimg:g} thousand images seen, and "
        f"{scale.many} (many) for {scale.many_kimg:g}. A measurement is of {scale.probe} training images at most in "
        f"{scale.views} views, at sigma {scale.sigma:g}, and of {scale.samples} samples. A sample is a copy where its nearest "
        "training image by pixels is less than a third as far as the second. The Frechet distance is that of pixels to "
        "held-out images. A probe learns from held-out images and is scored on "
        f"{scale.common['num_heldout'] // 2} others.",
        "",
        f"The scale is not the paper's: shapes and orders can be compared, values cannot. {scale.note}".strip(),
    ]


def picture_of(claim: Claim) -> str:
    """The name of a statement's figure."""
    return f"figure-{claim.figure:02d}.png" if isinstance(claim.figure, int) else f"figure-{claim.figure}.png"


def _section(claim: Claim, heading: str, results: Results) -> list[str]:
    """A statement with its figure, its numbers and its rule."""
    lines = ["", heading, "", f"{claim.claim}: **{claim.outcome}**.", ""]
    lines += [f"![{claim.claim}]({picture_of(claim)})", "", "| | |", "|---|---|"]
    lines.append(f"| here | {claim.numbers or 'not measured'} |")
    if isinstance(claim.figure, int):
        lines.append(f"| paper | {READINGS[claim.figure]} |")
    lines.append(f"| rule | {claim.rule} |")
    if claim.outcome in (DISAGREES, UNDECIDED) and (words := tried(claim.figure, results)):
        lines += ["", words]
    return lines


def _seen(value: float | None) -> str:
    return "not" if value is None else f"{value:,.0f}"


def image_table(role: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the likeliest copied images, most copies first, each with a page of its own."""
    places = ranks(rows)
    lines = [
        "| image | in the set | copies | first copied at | own ratio above 1.5 from | its end | distance to others | nearest |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in likeliest(rows, LISTED):
        image, link = row["image"], f"{page_name(role, row['image'])}.md"
        lines.append(
            f"| [{image}]({link}) | {row['times']} x | {row['copies']} | {_seen(row['first_copied'])} | "
            f"{_seen(row['turned'])} | {row['ratio']:.2f} | {row['to_others']:.2f} (no. {places[image]} of {len(rows)}) | "
            f"{', '.join(map(str, row['nearest']))} |"
        )
    return lines


def _origins(role: str, results: Results) -> list[str]:
    """The likeliest copied images of the role's first run that has them: a table and a picture."""
    for name, result in sorted(results.items()):
        if result["role"] == role and result.get("copies_picture"):
            lines = ["", f"The likeliest copied images of {name}, whose places in the training set are their numbers:", ""]
            lines += image_table(role, result["origins"])
            if "groups" in result:
                sizes: Counter[int] = Counter(result["groups"])
                groups = ", ".join(f"{count} groups of {size}" for size, count in sorted(sizes.items())) or "none"
                lines += ["", f"`mlflow-icr duplicates` finds these repeats before training: {groups}."]
            lines += ["", "Each row shows such an image, the sample nearest to it, and its five nearest images in the set:", ""]
            return [*lines, f"![the likeliest copied images](copies-{role}.png)"]
    return []


def page_text(claims: Sequence[Claim], beyond: Sequence[Claim], scale: Scale, results: Results) -> str:
    """The page as Markdown."""
    lines = [
        "# The paper, reproduced",
        "",
        "This page repeats the figures of Li, Jia, et al., ICML 2026, arXiv 2606.09718, and says for each claim",
        "whether it holds here. `mlflow run . -e paper` writes it from result files.",
        "",
        *_summary(claims, scale, results),
        "",
        *_setting(scale),
        "",
    ]
    lines += ["| figure | claim | outcome |", "|---|---|---|"]
    lines += [f"| [{claim.figure}](#figure-{claim.figure}) | {claim.claim} | **{claim.outcome}** |" for claim in claims]
    lines += [f"| beyond the paper | {claim.claim} | **{claim.outcome}** |" for claim in beyond]
    for claim in claims:
        lines += _section(claim, f"## Figure {claim.figure}", results)
        if claim.figure == 6:
            for what, name in _pictures(results).items():
                lines += ["", f"Each row an image and its nearest by the invariant part, {what}:", "", f"![{what}]({name})"]
    lines += ["", "## Beyond the paper"]
    for claim in beyond:
        lines += _section(claim, f"### {HEADINGS[str(claim.figure)]}", results)
        lines += _origins({OUTLIERS: EDM_FEW, REPEATS: DUPLICATES}.get(str(claim.figure), ""), results)
    return "\n".join(lines) + "\n"


def _pictures(results: Results) -> dict[str, str]:
    """Names on the page of the pictures of neighbours, by what they are."""
    shown: dict[str, str] = next((result["neighbours"] for result in results.values() if result.get("neighbours")), {})
    # Before, at and after: result files have their keys by the alphabet.
    return {what: f"figure-06-{what.split()[0]}.png" for what in sorted(shown, key=lambda what: ORDER.index(what.split()[0]))}


def write_page(scale: Scale, results: Results, place: Path, figures: Sequence[int], pictures: Path) -> list[Claim]:
    """Write figures, `claims.json` and `index.md` to a folder; returns the statements. `pictures` is the results' folder."""
    place.mkdir(parents=True, exist_ok=True)
    claims, beyond = all_claims(results), beyond_claims(results)
    drawn = {f"figure-{number:02d}.png": FIGURES[number] for number in figures}
    drawn |= {f"figure-{name}.png": draw for name, draw in BEYOND.items()}
    for name, draw in drawn.items():
        # Without the library's version and the time, which would change the file's bytes.
        draw(results).savefig(place / name, dpi=80, metadata={"Software": None})
    for result in results.values():
        for what, path in result.get("neighbours", {}).items():
            shutil.copyfile(pictures / path, place / _pictures(results)[what])
        if "copies_picture" in result:
            shutil.copyfile(pictures / result["copies_picture"], place / f"copies-{result['role']}.png")
    plain = [{"figure": c.figure, "claim": c.claim, "outcome": c.outcome, "numbers": c.numbers} for c in [*claims, *beyond]]
    (place / "claims.json").write_text(json.dumps(plain, indent=1) + "\n")
    write_image_pages(results, place, pictures)
    (place / "index.md").write_text(page_text(claims, beyond, scale, results))
    return [*claims, *beyond]

"""The audit: tests for copying with their results, tests that were not made with the reasons, and the likeliest copies."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlflow_icr.extraction.encoder_weights import FIDELITY, WEIGHTS
from mlflow_icr.generation import carlini_ratio, copy_similarity, memorization_ratio
from mlflow_icr.monitoring.judgement import CARLINI_NEIGHBOURS, COPY_ENCODERS
from mlflow_icr.reporting.gate import FORBIDDEN, MAX_COPIES, gate
from mlflow_icr.reporting.markup import Child, Markup, element, images_text, interval, joined, number, table
from mlflow_icr.reporting.material import RunMaterial
from mlflow_icr.reporting.pictures import picture

INTERVAL_LEVEL = "exact 95 % interval of such a share of samples (Clopper & Pearson)"


@dataclass(frozen=True)
class Detector:
    """A detector of copies: the keys that it logs, what it looks for, and its threshold."""

    pattern: str
    looks_for: str
    threshold: str


def _default(function: Callable[..., Any]) -> float:
    return float(inspect.signature(function).parameters["threshold"].default)


def detectors() -> tuple[Detector, ...]:
    """The detectors that measurements use, with the thresholds that they use."""
    ratio, cosine, carlini = (_default(function) for function in (memorization_ratio, copy_similarity, carlini_ratio))
    return (
        Detector(
            r"mem/ratio_(?P<encoder>.+)",
            "share of samples much nearer to one training image than to any other",
            f"distance to the nearest below {ratio:.3g} of that to the second nearest",
        ),
        Detector(
            r"mem/copies_(?P<encoder>.+)",
            "share of samples very similar to a training image",
            f"cosine above {cosine:g}",
        ),
        Detector(
            r"mem/carlini",
            "share of samples much nearer to one training image than to its surroundings",
            f"distance below {carlini:g} of half the mean distance to the {CARLINI_NEIGHBOURS} nearest",
        ),
        Detector(
            r"mem/authpct",
            "authentic samples in per cent: farther from their nearest training image than that is from its own neighbour",
            "distance ratio of 1",
        ),
        Detector(
            r"mem/ct",
            "whether samples are nearer to training images than held-out images are (C_T)",
            "none: far below 0 are copies",
        ),
    )


def _is_bound(key: str) -> bool:
    return key.endswith(("_low", "_high", "_train"))


def encoder_text(run: RunMaterial, name: str) -> str:
    """An encoder with the checksum of its weights, if that is known."""
    if name in ("l2", "pixels"):
        return "pixels, no network"
    recorded = run.params.get("encoder_sha256", "") if name == run.encoder else ""
    if recorded:
        return f"{name}, SHA-256 {recorded}"
    official = [listed[name].sha256 for listed in (WEIGHTS, FIDELITY) if name in listed and listed[name].sha256]
    if official:
        return f"{name}, SHA-256 {' or '.join(official)}, checked when it is loaded"
    return f"{name}, its checksum was not recorded" if name else "not recorded"


def _row(run: RunMaterial, key: str, detector: Detector, match: re.Match[str]) -> list[Child]:
    step, value = run.of(key)[-1]  # a key of the history has a value
    bounds = run.bounds(key, step)
    encoder = match.groupdict().get("encoder") or run.encoder
    cell: list[Child] = [number(value, key=key, step=step), " "]
    cell.append(interval(*bounds, key, step) if bounds else None)
    of_data = dict(run.of(f"{key}_train")).get(step)
    if of_data is not None:
        cell += [" of training images among themselves: ", number(of_data, key=f"{key}_train", step=step)]
    return [
        joined(element("code", key), element("br"), element("span", detector.looks_for, class_="quiet")),
        detector.threshold,
        encoder_text(run, encoder),
        _samples(run, step),
        joined(cell),
        joined(images_text(step)),
    ]


def _samples(run: RunMaterial, step: int) -> Child:
    count = dict(run.of("gen/num_samples")).get(step)
    if count is not None:
        return number(count, key="gen/num_samples", step=step)
    return run.params.get("num_samples", "not recorded")


def _tested(run: RunMaterial) -> list[list[Child]]:
    rows = []
    for detector in detectors():
        for key in run.keys:
            match = re.fullmatch(detector.pattern, key)
            if match and not _is_bound(key):
                rows.append(_row(run, key, detector, match))
    return rows


def _untested(run: RunMaterial) -> list[Markup]:
    """Values that are absent, with the reasons that were recorded."""
    noted, keys = run.noted("absent"), set(run.keys)
    entries = []
    for key, why in sorted(noted.items()):
        if key.startswith(("mem/", "gen/")):
            when = "at some measurements" if key in keys else "never measured"
            entries.append(element("li", element("code", key), f": {when}: {why}"))
    for detector in detectors():
        if not any(re.fullmatch(detector.pattern, key) for key in [*keys, *noted]):
            if "copies" in detector.pattern:
                why = f"an embedding made for copy detection ({', '.join(COPY_ENCODERS)}) was not used: copies that are moved, "
                why += "cropped or recoloured may not be found by the others"
            else:
                why = "there is no value in the history, and no reason was recorded"
            name = detector.pattern.replace("(?P<encoder>.+)", "*")
            entries.append(element("li", element("code", name), f": {why}"))
    return entries


def _reach(run: RunMaterial) -> Child:
    """The largest share of copies that the newest samples could have missed."""
    count, ratio = run.last("gen/num_samples"), run.last("mem/ratio_l2")
    if count is None or ratio is None or count[1] <= 0:
        return None
    bounds = run.bounds("mem/ratio_l2", ratio[0])
    if ratio[1] > 0 or bounds is None:
        return None
    most = joined(number(100 * bounds[1], digits=2), " %")
    return element("p", f"No copy among {count[1]:.0f} samples allows a share of up to ", most, " (95 %, exact).")


LIMITS = (
    "ICR and the verdict say what a network's features and errors do. They are no proof that a model copies, and none that it "
    "does not: only samples compared with training images show copies, and only for the samples that were drawn.",
    "Detectors compare with the images that this run was trained on, as they were given to it. They do not look for "
    "near-duplicates among those images, copies of a part of an image, or copies of images that are in no list of training "
    "images.",
    "The rates at which the verdict is right, and intervals hold the truth, were measured on small images and one kind of "
    "network: the file docs/validation.md of mlflow-icr's sources has them, with their own intervals.",
)


def audit(run: RunMaterial, most_bytes: int, links: Child = None) -> Markup:
    """The section on copying of one run; pictures take at most `most_bytes` each, and `links` follow the likeliest copies."""
    rows = _tested(run)
    judged = [row for row in run.rows if any(key.startswith("mem/") for key in row)]
    parts: list[Child] = []
    if rows:
        parts.append(
            element(
                "p",
                f"Samples were compared with training images at {len(judged)} of {len(run.rows)} measurements. Newest values, "
                f"with {INTERVAL_LEVEL}:",
            )
        )
        head = ("detector", "threshold", "compared in", "samples", "value", "images seen")
        parts.append(table(head, rows, class_="wide"))
        parts.append(_reach(run))
    else:
        parts.append(element("p", element("strong", "Nothing was tested for copying in this run."), class_="warning"))
    outcome = gate(run, MAX_COPIES, FORBIDDEN)
    command = f"mlflow-icr gate --max-copies {MAX_COPIES:g} --forbid {' --forbid '.join(FORBIDDEN)}"
    parts.append(element("p", element("strong", outcome.text), " (", element("code", command), ")"))
    warned = {key: text for key, text in run.noted("warning").items() if key.startswith(("mem/", "gen/"))}
    if warned:
        parts.append(element("h4", "Remarks on these values"))
        parts.append(element("ul", [element("li", element("code", key), f" is {text}") for key, text in warned.items()]))
    parts.append(element("h4", "Not tested"))
    parts.append(element("ul", _untested(run)))
    parts.append(_worst_pairs(run, most_bytes))
    parts.append(links)
    parts.append(element("h4", "What this does not say"))
    parts.append(element("ul", [element("li", text) for text in LIMITS]))
    return joined(parts)


def _worst_pairs(run: RunMaterial, most_bytes: int) -> Child:
    walls = run.pictures.get("nearest", {})
    if not walls:
        return element("p", "No picture of the likeliest copies was kept.", class_="quiet")
    step = max(walls)
    caption = (
        f"At {images_text(step)} images seen: generated images above, the nearest training image below each, the likeliest "
        "copy first. The number is the distance to it as a share of that to the second nearest; small is suspicious."
    )
    figures = [picture(walls[step], caption, f"the likeliest copies at {images_text(step)} images seen", most_bytes)]
    histograms = run.pictures.get("distances", {})
    if histograms:
        last = max(histograms)
        text = f"At {images_text(last)} images seen: distances of samples to training images; copies gather at the left."
        figures.append(picture(histograms[last], text, f"distances at {images_text(last)} images seen", most_bytes))
    return joined(element("h4", "The likeliest copies"), figures)

"""The sections of one run, and how its numbers were computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from mlflow_icr.monitoring.evidence import NAMES, Thresholds
from mlflow_icr.monitoring.summary import ONSET_RATIO
from mlflow_icr.monitoring.verdict import GENERALIZING, MEMORIZING, TURNING, UNDECIDED
from mlflow_icr.reporting.audit import audit
from mlflow_icr.reporting.comparison import badge, onset_cell, turn_cell, value_cell
from mlflow_icr.reporting.copied import LISTED, copied_images, image_links, images_section
from mlflow_icr.reporting.curves import run_charts
from mlflow_icr.reporting.markup import Child, Markup, element, fold, images_text, joined, number, table
from mlflow_icr.reporting.material import RunMaterial
from mlflow_icr.reporting.pictures import picture, spread

SAMPLE_STEPS = 5  # measurements whose samples are shown
MOST_ROWS = 60  # of the table of measurements; history.jsonl and MLflow have all
# Those of one run: samples and neighbours over training, the audit's two, three of features, figures of the whole run,
# and the likeliest copied images.
PICTURES_OF_A_RUN = 2 * SAMPLE_STEPS + 8 + LISTED

MEANINGS = {
    GENERALIZING: "The model still learns what its images have in common. Continue training.",
    TURNING: "The model has begun to learn its images by heart. Samples need not be copies yet; the checkpoint to keep is "
    "named.",
    MEMORIZING: "Samples were looked at, and two detectors of copies or more agree. Look at the audit below.",
    UNDECIDED: "Evidence is missing, or the signs of a turn are within the noise. The model may still copy.",
}
COLUMNS = (
    ("repr/icr_debiased", "ICR, debiased"),
    ("repr/icr", "ICR, plug-in"),
    *NAMES.items(),
    ("mem/ratio_l2", "copies"),
    ("repr/fisher_residual_growth", "residual growth"),
    ("loss/train", "training loss"),
    ("loss/heldout", "held-out loss"),
)
FEATURE_PICTURES = {
    "neighbours_s": "Images at the left, and their nearest by the part of the features that views share: they should show "
    "the same.",
    "neighbours_xi": "The same by the part that views do not share: neighbours have crop, flip and brightness in common.",
    "largest_residuals": "Training images with the largest shares of the residual energy, the largest first.",
}


def verdict_section(run: RunMaterial) -> Markup:
    """The verdict with its evidence, and the run in a few numbers."""
    verdict = run.verdict
    facts: list[tuple[str, Child]] = [
        ("turned at, images seen", turn_cell(run) if verdict.turned_at is not None else "no turn was seen"),
        (
            "copies begin at, images seen",
            onset_cell(run) if "mem_onset_images_seen" in run.summary else "nowhere so far",
        ),
    ]
    if not run.of("mem/ratio_l2"):
        facts[1] = (facts[1][0], "samples were not compared with training images")
    if verdict.cleared_at is not None:
        facts.append(("the turn cleared at, images seen", number(verdict.cleared_at, key="cleared_at_images_seen")))
    if verdict.checkpoint_images_seen is not None:
        checkpoint = number(verdict.checkpoint_images_seen, key="checkpoint_images_seen")
        facts.append(("checkpoint to keep, images seen", checkpoint))
    for key, name in ((run.icr_key, "ICR"), (run.ratio_key, NAMES[run.ratio_key]), ("mem/ratio_l2", "copies")):
        facts.append((f"{name}, last", value_cell(run, key, run.last(key))))
        if key == run.icr_key:
            facts.append((f"{name}, lowest", value_cell(run, key, run.lowest(key))))
    listed = [element("div", element("dt", name), element("dd", value)) for name, value in facts]
    return element(
        "div",
        element("p", badge(verdict.state), " ", MEANINGS.get(verdict.state, ""), class_="verdict"),
        element("dl", listed, class_="facts"),
        element("p", verdict.forecast.text),
        element("ul", [element("li", text) for text in verdict.evidence]),
        class_="said",
    )


def notes_section(run: RunMaterial) -> Markup:
    """Remarks before reading: few measurements, values left out, and absent values with reasons."""
    notes: list[Child] = []
    if len(run.rows) < 6:
        notes.append(f"There are {len(run.rows)} measurements; curves of so few points say little.")
    if run.left_out:
        notes.append(f"{run.left_out} values of the history are not finite numbers, and are left out.")
    for key, why in sorted(run.noted("absent").items()):
        if key.startswith("repr"):
            when = "at some measurements" if key in run.keys else "nowhere"
            notes.append(
                joined(element("code", key), f" is absent {when}: {why}" if when != "nowhere" else f" is absent: {why}")
            )
    return element("ul", [element("li", note) for note in notes], class_="notes") if notes else joined()


def samples_section(run: RunMaterial, most_bytes: int) -> Markup:
    """Samples over training with their nearest training images; the newest neighbours are in the audit."""
    samples, walls = run.pictures.get("samples", {}), run.pictures.get("nearest", {})
    if not samples:
        return element("p", "No pictures of samples were kept.", class_="quiet")
    blocks = []
    newest = max(walls, default=-1)
    for step in spread(list(samples), SAMPLE_STEPS):
        at = f"{images_text(step)} images seen"
        figures = [picture(samples[step], f"Samples at {at}", f"samples at {at}", most_bytes)]
        if step in walls and step != newest:
            text = "Above: samples, the likeliest copies first. Below each: its nearest training image."
            figures.append(picture(walls[step], text, f"samples and nearest training images at {at}", most_bytes))
        elif step == newest:
            figures.append(element("p", "Their nearest training images are in the audit.", class_="quiet"))
        blocks.append(element("div", figures, class_="pair"))
    return joined(blocks)


def features_section(run: RunMaterial, most_bytes: int) -> Markup | None:
    """Pictures of the features at the newest measurement, and figures of the whole run."""
    figures = []
    for key, caption in FEATURE_PICTURES.items():
        steps = run.pictures.get(key, {})
        if steps:
            at = f"{images_text(max(steps))} images seen"
            figures.append(picture(steps[max(steps)], f"{caption} At {at}.", f"{key.replace('_', ' ')} at {at}", most_bytes))
    for name, read in list(run.figures.items())[:3]:
        caption = "Quality of samples against copies, over the training." if name == "trade_off" else name
        figures.append(picture(read, caption, name.replace("_", " "), most_bytes))
    return fold("Features, and figures of the whole run", figures) if figures else None


def protocol_section(run: RunMaterial) -> Markup:
    """What was measured, on what, with the digest; all parameters and tags folded up."""
    names = {"digest": "protocol digest", "num_images": "probe images", "num_views": "views of each"}
    rows = [(names.get(name, name), value) for name, value in run.protocol.items()]
    for name in (
        "data",
        "data_sha256",
        "heldout_sha256",
        "probe_sha256",
        "encoder",
        "encoder_sha256",
        "num_samples",
        "feature_dim",
    ):
        value = run.params.get(name) or run.tags.get(f"icr.{name}", "")
        if value:
            rows.append((name, value))
    protocol = (
        table(("protocol", "value"), rows, class_="pairs")
        if rows
        else element("p", "No protocol was recorded.", class_="quiet")
    )
    params = sorted(run.params.items())
    hidden = ("absent.", "warning.", "mlflow.", "verdict", "logged.")
    tags = [(key, text) for key, text in sorted(run.tags.items()) if not key.startswith(hidden)]
    return joined(
        protocol,
        fold(f"All {len(params)} parameters", table(("parameter", "value"), params, class_="pairs")) if params else None,
        fold(f"{len(tags)} tags", table(("tag", "value"), tags, class_="pairs")) if tags else None,
    )


def measurements_section(run: RunMaterial) -> Markup:
    """The history as a table, of about MOST_ROWS measurements at most, and every key's last and extreme values."""
    columns = [(key, name) for key, name in COLUMNS if run.of(key)]
    steps = [int(row["images_seen"]) for row in run.rows]
    listed_steps = steps if len(steps) <= MOST_ROWS else [0] * (0 in steps) + spread(steps, MOST_ROWS)
    rows: list[list[Child]] = []
    for step in listed_steps:
        cells: list[Child] = [images_text(step)]
        for key, _ in columns:
            value = run.by_step[step].get(key)
            cells.append("\N{EN DASH}" if value is None else value_cell(run, key, (step, value), at=False))
        rows.append(cells)
    note = None
    if len(listed_steps) < len(steps):
        note = element("p", f"{len(listed_steps)} of {len(steps)} measurements; all are in the run's history.", class_="quiet")
    head = ("images seen", *(name for _, name in columns))
    extremes = []
    for key in run.keys:
        points = run.of(key)
        (step, value), low, high = points[-1], min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
        cells = [element("code", key), number(value, key=key, step=step), images_text(step)]
        extremes.append([*cells, number(low[1], key=key, step=low[0]), number(high[1], key=key, step=high[0])])
    return joined(
        fold(f"All {len(steps)} measurements", note, table(head, rows)),
        fold(f"All {len(extremes)} values", table(("key", "last", "at images seen", "lowest", "highest"), extremes)),
    )


def run_section(run: RunMaterial, anchor: str, most_bytes: int, *, opened: bool, alone: bool) -> Markup:
    """Everything about one run."""
    images = copied_images(run)
    place = element("p", run.place, f", {run.status}" if run.status else "", class_="quiet place")
    body: Sequence[Child] = (
        place,
        verdict_section(run),
        notes_section(run),
        element("h3", "Curves"),
        element("div", run_charts(run), class_="charts"),
        element("h3", "Samples over training"),
        samples_section(run, most_bytes),
        element("h3", "Audit: what was tested for copying"),
        audit(run, most_bytes, image_links(images, anchor)),
        images_section(images, anchor, most_bytes),
        features_section(run, most_bytes),
        element("h3", "Protocol"),
        protocol_section(run),
        measurements_section(run),
    )
    if alone:
        return element("section", body, id=anchor)
    return element("section", fold(run.name, *body, opened=opened), id=anchor, class_="run")


def method_section() -> Markup:
    """How the numbers were computed."""
    t = Thresholds()
    values = ", ".join(f"{field.name} {getattr(t, field.name):g}" for field in fields(t))
    items: list[Child] = [
        "Features: a few training images are augmented and noised, each into several views, and a layer of the network is read "
        "(see the protocol). Two-way centring splits the features into what the views of an image share and what they do not "
        "(residual).",
        "ICR = 1 / (1 + mean eigenvalue of the shared covariance relative to the residual one): the share of contamination; "
        "low is clean. The debiased value takes out what a small sample adds; its interval (95 %) comes from leaving images "
        "out.",
        "View error ratio: squared error of denoising views of training images over that of the images themselves, at the "
        "protocol's noise; interval of its logarithm, paired by image.",
        "Verdict: a turn is found in the errors alone, without samples or held-out images; memorizing takes two detectors of "
        f"copies. Thresholds: {values}. A turn is dated with the bounds between which it may lie; all in images seen.",
        "Copies: detectors compare samples with training images (audit). Copies begin at the first measurement from which "
        f"more than {100 * ONSET_RATIO:g} % of samples are called copies by pixels, up to the end.",
        "Energies: traces and Fisher energies are of l2-normalised features; growth is relative to the first measurement after "
        "the start. A value that could not be computed is left out with its reason; nothing replaces it.",
        "ICR: Li, Jia, et al., Evaluating the Representation Space of Diffusion Models via Self-Supervised Principles, ICML "
        "2026, arXiv 2606.09718. Formulas in full: docs/built/formulas.md of mlflow-icr's sources.",
    ]
    return element("ul", [element("li", item) for item in items])

"""The design of the validation study: which runs there are, in which order, and on which half thresholds are chosen.

`python -m studies.validation.design` writes `plan.json`, a function of the seed below. The file was committed before the first
of its runs was trained, and a test holds it to this code. It was amended three times: after six and after ten runs, of which
none copied anything, lengths became multiples of N in optimizer steps, by width, and `fast_runs` were added. The third time,
after fourteen runs, was for cost: fewer runs, each measured more seldom and with fewer samples, and learning rates and lengths
by which most of the small ones should copy within minutes. All runs are new since, with seeds and halves of their own, and the
fourteen are in no table, for the plan was amended after a look at them. Detectors, horizons and comparisons are what they were.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PLAN = Path(__file__).parent / "plan.json"
SEED = 2026
DECOUPLED_RUNS = 80
CANDIDATES = 400  # of which each next run is the one that leaves the design most balanced

# Images by name: `--data`, the side in pixels, held-out images, and for EDM the deviation of pixels in [-1, 1].
IMAGES: dict[str, dict[str, Any]] = {
    "digits8": {"data": "digits", "resolution": 8, "num_heldout": 197, "sigma_data": 0.75},
    "mnist12": {"data": "mnist5k", "resolution": 12, "num_heldout": 256},
    "fashion12": {"data": "fashion-mnist", "resolution": 12, "num_heldout": 256},
    "mnist8": {"data": "mnist5k", "resolution": 8, "num_heldout": 256},
    "fashion8": {"data": "fashion-mnist", "resolution": 8, "num_heldout": 256},
    "cifar8": {"data": "cifar10", "resolution": 8, "num_heldout": 256},
    "cifar16": {"data": "cifar10", "resolution": 16, "num_heldout": 256},
}
SETS = ("digits8", "mnist8", "fashion8", "cifar8", "cifar16")
FAMILIES = ("edm", "v", "flow")
# Each as often as its cost allows; widths are channels of a U-Net's first block, half those of its second.
SIZES = (64, 64, 64, 64, 64, 64, 128, 128, 128, 256, 512)
WIDTHS = (8, 8, 16, 16, 32, 32, 64)
HIDDEN = {8: 32, 16: 64, 32: 96, 64: 128}  # a transformer of about that cost
DROPOUTS = (0.0, 0.3)
AUGMENTATIONS = ("none", "flip")
RATES = (7.5e-4, 1.5e-3, 3e-3)
BATCHES = (16, 32, 64)
# A run's length in optimizer steps, for each training image, by width, at a learning rate of 1e-3; they go with its inverse
# root, and with dropout they are half as many again. Digits are copied after some 20 (EDM, width 32, batch 16).
STEPS_PER_IMAGE = {8: 60, 16: 35, 32: 20, 64: 12}
SLOWNESS = {"edm": 1.4, "v": 1.6, "flow": 2.2}  # the other families copy later
# Images a second at 8x8 with a batch of 48 on one slow core, and factors of other batches: a run's cost is estimated from them.
SPEED = {"unet": {8: 1260, 16: 800, 32: 360, 64: 125}, "flow": {8: 2200, 16: 1270, 32: 760, 64: 590}}
BATCH_SPEED = {16: 0.6, 32: 0.85, 48: 1.0, 64: 1.1, 128: 1.4}
DENOISED = 5000 / 3.4  # a measurement's denoised images, in images trained on, which cost 3.4 times as much
# A training ends after so many seconds, and is not drawn where that is less than this share of its length, so that most copy;
# of many images, or of 16 pixels, few can, and they end sooner.
MOST_SECONDS, LEAST_SHARE = 140, 0.75
MOST_SECONDS_DEAR, LEAST_SHARE_DEAR = 60, 0.1

# How every run is measured.
MONITOR: dict[str, Any] = {
    "measurements": 11,
    "probe_images": 256,
    "num_samples": 96,
    "sample_steps": 8,
    "encoder": "pixels",
}
# When a detector says that a run copies: from the first measurement on from which it says so at all that follow. The distance
# ratio is the leading one; the others are columns beside it.
TRUTH: dict[str, dict[str, Any]] = {
    "distance ratio": {"key": "mem/ratio_l2", "above": 0.05},
    "C_T": {"key": "mem/ct", "below": -3.0},
    "authenticity": {"key": "mem/authpct", "below": 25.0},
    "copy similarity": {"key": "mem/copies_sscd", "above": 0.05},
}
# Epochs at which runs are compared: of two that have copied nothing by then, does the one with the higher signal copy sooner?
HORIZONS = [12, 25, 50, 100, 200, 400]


def chosen_on(name: str) -> bool:
    """Whether a run is of the half on which thresholds are chosen: by a hash of its name."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0


def images_a_second(run: Mapping[str, Any]) -> float:
    """Images of its set that a network is trained on in a second, in batches of 48."""
    kind = "flow" if run["family"] == "flow" else "unet"
    return float(SPEED[kind][run["width"]] * (8 / IMAGES[run["images"]]["resolution"]) ** 1.8)


def seconds_of(run: Mapping[str, Any], kimg: float) -> float:
    """The estimated seconds of a run's training on one core."""
    return 1000 * kimg / (images_a_second(run) * BATCH_SPEED[run["batch_size"]])


def cost_of(planned_run: Mapping[str, Any]) -> float:
    """Seconds on one core of a run of the plan, with what comes before it and its measurements."""
    run = planned_run["factors"]
    kimg = planned_run["options"]["total_kimg"] + planned_run.get("before", {}).get("total_kimg", 0.0)
    measured = (MONITOR["measurements"] + 1) * DENOISED / images_a_second(run)
    return seconds_of(run, kimg) + measured


def network_options(family: str, width: int) -> dict[str, Any]:
    """The trainer's options of the network."""
    if family == "flow":
        return {"family": "flow", "hidden_size": HIDDEN[width], "num_layers": 3, "num_heads": 2, "patch_size": 2}
    network: dict[str, Any] = {"block_channels": [width, 2 * width], "layers_per_block": 1}
    if family == "v":
        return {"family": "ddpm", "prediction": "v", "beta_schedule": "squaredcos_cap_v2"} | network
    return {"family": "edm"} | network


def options_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the trainer for a run's factors; total_kimg is the caller's."""
    images = {key: value for key, value in IMAGES[run["images"]].items() if key != "sigma_data" or run["family"] == "edm"}
    options = images | network_options(run["family"], run["width"])
    options |= {key: run[key] for key in ("num_images", "dropout", "learning_rate", "batch_size", "seed")}
    return options | ({} if run["augment"] == "none" else {"augment": run["augment"]})


def name_of(run: Mapping[str, Any]) -> str:
    """A name with all factors, and the kind of a long run."""
    kind = run.get("kind", run["panel"]).replace(" ", "-")
    return (
        f"{kind}-{run['images']}-{run['family']}-n{run['num_images']}-w{run['width']}-d{run['dropout']:g}-{run['augment']}"
        f"-lr{run['learning_rate']:g}-b{run['batch_size']}-s{run['seed']}"
    )


def kimg_needed(run: Mapping[str, Any], share: float = 1.0) -> float:
    """Thousands of images in which copies should have come: so many steps for each training image."""
    steps = share * SLOWNESS[run["family"]] * STEPS_PER_IMAGE[run["width"]] * run["num_images"]
    steps *= (1e-3 / run["learning_rate"]) ** 0.5 * (1.5 if run["dropout"] else 1.0)
    return float(f"{steps * run['batch_size'] / 1000:.3g}")


def kimg_within(run: Mapping[str, Any], seconds: float, most_epochs: float) -> float:
    """Thousands of images that so many seconds allow, and at most so many epochs."""
    return float(f"{min(seconds / seconds_of(run, 1), most_epochs * run['num_images'] / 1000):.3g}")


def is_dear(run: Mapping[str, Any]) -> bool:
    """Whether a run would take long to copy, for its many images or pixels."""
    return bool(run["num_images"] > 128 or run["images"] == "cifar16")


def kimg_of(run: Mapping[str, Any], share: float = 1.0, seconds: float | None = None) -> float:
    """Thousands of images that a run sees: as many as copies should take, or as the time allows."""
    most = MOST_SECONDS_DEAR if is_dear(run) else MOST_SECONDS
    return min(kimg_needed(run, share), kimg_within(run, most if seconds is None else seconds, 1e9))


def planned(run: Mapping[str, Any], kimg: float, **others: Any) -> dict[str, Any]:
    """The plan's entry of a run."""
    name = name_of(run)
    needs = sorted({"augment"} if run["augment"] != "none" else set()) + (["init_from"] if others.get("before") else [])
    options = options_of(run) | {"total_kimg": kimg, "first_measurement_kimg": first_kimg(kimg)}
    factors = {key: run[key] for key in run if key != "seed"}
    return {"name": name, "chosen_on": chosen_on(name), "needs": needs, "factors": factors, "options": options} | others


def first_kimg(total_kimg: float) -> float:
    """Where measuring begins: one part in 24 of the run, so that the verdict sees some four and a half doublings."""
    return float(f"{total_kimg / 24:.2g}")


def _draw(rng: random.Random, seed: int) -> dict[str, Any]:
    return {
        "panel": "decoupled",
        "images": rng.choice(SETS),
        "family": rng.choice(FAMILIES),
        "num_images": rng.choice(SIZES),
        "width": rng.choice(WIDTHS),
        "dropout": rng.choice(DROPOUTS),
        "augment": rng.choice(AUGMENTATIONS),
        "learning_rate": rng.choice(RATES),
        "batch_size": rng.choice(BATCHES),
        "seed": seed,
    }


WEIGHTED: dict[Any, tuple[int, ...]] = {"num_images": SIZES, "width": WIDTHS}
FACTORS = ("images", "family", "num_images", "width", "dropout", "augment", "learning_rate", "batch_size", "half")


def _levels(run: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """A run's levels and pairs of levels; runs without augmentation come first, so their levels also count apart."""
    values = {**run, "half": chosen_on(name_of(run))}
    single = [(factor, values[factor]) for factor in FACTORS]
    return [*single, *itertools.combinations(single, 2), *(("plain", run["augment"], level) for level in single)]


def _imbalance(run: Mapping[str, Any], counts: Counter[tuple[Any, ...]]) -> float:
    """How often a run's levels were drawn already, each relative to how often it should be; single ones count ten times."""
    total = 0.0
    for level in _levels(run):
        drawn = WEIGHTED.get(level[0])
        share = drawn.count(level[1]) / len(drawn) * len(set(drawn)) if drawn else 1.0
        total += counts[level] / share * (10 if isinstance(level[0], str) else 1)
    return total


def decoupled_runs() -> list[dict[str, Any]]:
    """Limited runs over all factors, each the best of many draws, so that the first n are about balanced for any n."""
    rng, counts = random.Random(SEED), Counter[tuple[Any, ...]]()
    runs: list[dict[str, Any]] = []
    while len(runs) < DECOUPLED_RUNS:
        drawn = [_draw(rng, 5000 + len(runs)) for _ in range(CANDIDATES)]
        drawn = [r for r in drawn if kimg_of(r) >= (LEAST_SHARE_DEAR if is_dear(r) else LEAST_SHARE) * kimg_needed(r)]
        best = min(drawn, key=lambda r: (_imbalance(r, counts), name_of(r)))
        counts.update(_levels(best))
        runs.append(planned(best, kimg_of(best)))
    return runs


def fast_runs() -> list[dict[str, Any]]:
    """Runs that copy soon if any do: every set by every family, 64 images, no dropout, many steps for each image seen."""
    runs = []
    for i, (images, family) in enumerate(itertools.product(SETS, FAMILIES)):
        width = 16 if images == "cifar16" else 32
        base: dict[str, Any] = {
            "panel": "fast",
            "images": images,
            "family": family,
            "num_images": 64,
            "width": width,
            "dropout": 0.0,
        }
        run = base | {
            "augment": "none",
            "learning_rate": (1e-3, 2e-3)[i % 2],
            "batch_size": (16, 32)[i // 2 % 2],
            "seed": 5200 + i,
        }
        runs.append(planned(run, kimg_of(run, 1.2, 270 if images == "cifar16" else 115)))
    random.Random(SEED).shuffle(runs)
    return runs


def _long(images: str, family: str, num_images: int, width: int, seed: int, **others: Any) -> dict[str, Any]:
    base = {"panel": "long", "images": images, "family": family, "num_images": num_images, "width": width, "dropout": 0.0}
    return base | {"augment": "none", "learning_rate": 1e-3, "batch_size": 32, "seed": seed} | others


RICH = {"digits8": 1600, "mnist8": 4000, "fashion8": 8000, "cifar8": 8000, "cifar16": 8000}


def long_runs() -> Iterator[list[dict[str, Any]]]:
    """Five kinds of long runs, each balanced over images and families."""
    seeds = itertools.count(5300)

    def pick(place: int) -> tuple[str, str]:
        return SETS[place % len(SETS)], FAMILIES[(place + place // len(SETS)) % len(FAMILIES)]

    kinds: list[list[dict[str, Any]]] = [[] for _ in range(5)]
    rich, narrow, changed, late, tuned = kinds
    for i in range(5):
        images, family = pick(i)
        run = _long(images, family, RICH[images], (16, 32)[i % 2], next(seeds), kind="rich", batch_size=BATCHES[i % 3])
        rich.append(planned(run, kimg_within(run, 90, 600)))
    for i in range(5):
        images, family = pick(i + 2)
        run = _long(images, family, 128 if images == "cifar16" else 256, 8, next(seeds), kind="narrow", batch_size=64)
        narrow.append(planned(run, kimg_within(run, 1e9, 1000 if i == 3 else 600)))
    for i in range(4):
        images, family = pick(i + 2)
        batch, other = ((64, 16), (16, 64))[i % 2]
        run = _long(images, family, 64, 16, next(seeds), kind="batch changed", batch_size=batch)
        kimg = kimg_of(run | {"batch_size": 32}, seconds=130)
        # Once before a turn is to be expected, once after.
        after = [{"at_kimg": float(f"{kimg * (0.2, 0.5)[i // 2]:.3g}"), "batch_size": other}]
        changed.append(planned(run, kimg, changes=after))
    for i in range(4):
        images, family = pick(i + 3)
        run = _long(images, family, 64, (16, 32)[i % 2], next(seeds), kind="attached late")
        before = options_of(run) | {"total_kimg": kimg_of(run, (0.15, 0.35)[i // 2], 40)}
        late.append(planned(run, kimg_of(run, seconds=110), before=before))
    for i in range(5):
        images, family = pick(i + 4)
        run = _long(images, family, (64, 128)[i % 2], (16, 32)[i // 2 % 2], next(seeds), kind="fine-tuned", learning_rate=1e-3)
        # Learnt beforehand: many images of the same kind, those to come hardly among them.
        learned = run | {"seed": run["seed"] + 500, "num_images": RICH[images] // 2}
        tuned.append(
            planned(run, kimg_of(run, seconds=110), before=options_of(learned) | {"total_kimg": kimg_within(learned, 40, 600)})
        )
    yield from kinds


def _interleaved(
    decoupled: Sequence[dict[str, Any]], fast: Sequence[dict[str, Any]], *long: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One list, in which each is spread evenly: fast runs over the first half, long ones after the first tenth."""
    placed = [((i + 0.5) / len(decoupled), run["name"], run) for i, run in enumerate(decoupled)]
    placed += [(i / len(fast) / 2, run["name"], run) for i, run in enumerate(fast)]
    placed += [((i + 1) / (len(runs) + 1), run["name"], run) for runs in long for i, run in enumerate(runs)]
    return [run for _, _, run in sorted(placed, key=lambda entry: entry[:2])]


def design() -> dict[str, Any]:
    """The whole plan: what was fixed before the first run, and the runs in the order in which they are trained."""
    runs = _interleaved(decoupled_runs(), fast_runs(), *long_runs())
    return {"seed": SEED, "monitor": MONITOR, "truth": TRUTH, "open_factor": 2.0, "horizons_epochs": HORIZONS, "runs": runs}


def text_of(plan: Mapping[str, Any]) -> str:
    """The plan as JSON, a run a line."""
    lines = ",\n".join("    " + json.dumps(run) for run in plan["runs"])
    head = json.dumps({key: value for key, value in plan.items() if key != "runs"}, indent=2)[:-2]
    return f'{head},\n  "runs": [\n{lines}\n  ]\n}}\n'


def main() -> int:
    """Write the plan."""
    PLAN.write_text(text_of(design()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

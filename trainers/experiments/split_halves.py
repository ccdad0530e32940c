"""Two networks on disjoint halves of the images: do they draw the same pictures from the same noise?

Where both have learnt what all images share, they do, though they have not one training image in common; where each has learnt
its own images by heart, they do not (Kadkhodaie et al. 2024, "Generalization in diffusion models arises from geometry-adaptive
harmonic representations", figure 2). This needs no threshold and no distance to training images, and so it stands beside the
verdict. With --study-dir nothing is trained, and the two runs in that folder are compared.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_icr.monitoring.plots import COLOURS
from mlflow_icr.monitoring.series import HISTORY, read_history
from mlflow_icr.monitoring.verdict import verdict
from mlflow_icr.tracking.checkpoints.folder import checkpoints
from trainers.command_line import CommandLine, add_config_flags, config_changes, config_flags
from trainers.config import TrainConfig, config_from, load_config, preset_names, read_values
from trainers.data import load_source
from trainers.experiments.siblings import Sibling, run_siblings
from trainers.launchers.job import FINISHED
from trainers.train import CONFIG, Stop, check_project

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from mlflow_icr import Denoiser

logger = logging.getLogger(__name__)

AUTO = "auto"
ROLES = ("first half", "second half")
FOLDERS = dict(zip(ROLES, ("first", "second"), strict=True))
SAMPLES = 128  # pairs of samples: the agreement's standard error is a few hundredths then
TABLE, PICTURE = "split_halves.csv", "split_halves.png"


@dataclass(frozen=True)
class Agreement:
    """A share between about 0 (strangers) and 1 (the same pictures), with a 95 % interval."""

    value: float
    low: float
    high: float


def agreement(first: Tensor, second: Tensor) -> Agreement:
    """The agreement of pictures (M, ...) that two networks draw from the same M noises.

    1 - mean |a_i - b_i|^2 / mean |a_i - b_j|^2, j being any other noise: the share of the pictures' variance that the noise
    explains in both alike, the intraclass correlation; no scale and no threshold enters. The interval is by the jackknife over
    noises. Raises ValueError for other than two sets of one shape with at least 3 pictures, and where all pictures are one.
    """
    import torch

    if first.shape != second.shape or len(first) < 3:
        raise ValueError(f"pictures are {tuple(first.shape)} and {tuple(second.shape)}; expected one shape, and at least 3")
    count = len(first)
    a, b = (x.double().flatten(1) for x in (first, second))
    # Not by products: the squares of equal pictures are exactly 0.
    squares = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()  # (M, M)
    own = squares.diagonal()
    others = squares.sum() - own.sum()
    if not others > 0:
        raise ValueError("all pictures are one and the same; an agreement needs some that differ")
    value = float(1 - own.mean() / (others / (count * (count - 1))))
    # Leaving out noise i removes its row and its column.
    rest = others - (squares.sum(0) + squares.sum(1) - 2 * own)
    left_out = 1 - (own.sum() - own) / (count - 1) / (rest / ((count - 1) * (count - 2)))
    error = float(((left_out - left_out.mean()) ** 2).sum() * (count - 1) / count) ** 0.5
    return Agreement(value, value - 1.96 * error, min(1.0, value + 1.96 * error))


@dataclass(frozen=True)
class Compared:
    """The two networks after the same images seen: their agreement, and each one's verdict and share of copies by then."""

    images_seen: int
    agreement: float
    low: float
    high: float
    verdict_first: str
    verdict_second: str
    copies_first: float
    copies_second: float


@dataclass(frozen=True)
class Halves:
    """Two trainings that differ in their images alone, and the folder of both."""

    name: str
    folder: Path
    configs: Mapping[str, TrainConfig]  # by role
    parallel: int = 2

    def output_dir(self, role: str) -> Path:
        """A run's folder."""
        return self.folder / FOLDERS[role]


def _parser() -> CommandLine:
    parser = CommandLine(
        prog="split_halves",
        usage="python -m trainers.experiments.split_halves [--preset NAME] [flags]",
        description=__doc__,
        epilog="example:\n  python -m trainers.experiments.split_halves --num-images 128 --total-kimg 130\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset", default="digits", metavar="NAME", help=f"the preset of both runs: {', '.join(preset_names())}"
    )
    parser.add_argument("--output-dir", default=AUTO, metavar="DIR", help="folder of the study; default: a new one in outputs/")
    parser.add_argument(
        "--study-dir", default="", metavar="DIR", help="compare the two trained halves in this folder; train nothing"
    )
    parser.add_argument("--max-parallel", type=int, default=2, metavar="N", help="runs at the same time; default: 2")
    add_config_flags(parser)
    return parser


def halves_of(preset: str, changes: Mapping[str, object]) -> dict[str, TrainConfig]:
    """The two configurations: num_images images each, none in both. Raises ValueError where the set has too few."""
    first = load_config(preset, {"checkpoints_total_limit": 0, **changes})
    data = first.data
    available = len(load_source(data.source, data.size, data.split)) - data.num_heldout
    if 2 * data.num_images > available:
        raise ValueError(
            f"num_images is {data.num_images}; expected at most {available // 2}, half of {data.source!r} without "
            f"{data.num_heldout} held-out images"
        )
    return {ROLES[0]: first, ROLES[1]: first.changed(skip_images=data.num_images)}


def plan(argv: Sequence[str] | None) -> Halves:
    """The study that a command line asks for. Raises ValueError for impossible values, before anything runs."""
    arguments = _parser().parse_args(argv)
    if arguments.study_dir:
        return halves_in(Path(arguments.study_dir))
    configs = halves_of(arguments.preset, config_changes(arguments))
    first = configs[ROLES[0]]
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{first.preset}-halves-n{first.data.num_images}-seed{first.run.seed}"
    folder = Path("outputs") / name if arguments.output_dir == AUTO else Path(arguments.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output_dir is {str(folder)!r}, which is not empty; expected a new folder, or --study-dir")
    check_project()
    return Halves(name, folder, configs, arguments.max_parallel)


def halves_in(folder: Path) -> Halves:
    """The two halves in a study's folder. Raises ValueError where they are not both there, or share images."""
    places = {role: folder / name / CONFIG for role, name in FOLDERS.items()}
    for path in places.values():
        if not path.exists():
            raise ValueError(f"study_dir is {str(folder)!r}; expected a folder with {' and '.join(FOLDERS.values())}/{CONFIG}")
    configs = {role: config_from(read_values(path)) for role, path in places.items()}
    starts = sorted(config.data.skip_images for config in configs.values())
    if starts[1] - starts[0] < configs[ROLES[0]].data.num_images:
        raise ValueError(f"study_dir is {str(folder)!r}, whose two runs share training images; expected disjoint halves")
    return Halves(folder.name, folder, configs)


def compare(halves: Halves) -> list[Compared]:
    """Both networks side by side at every checkpoint that both have. Raises ValueError where there is none."""
    from mlflow_icr.extraction.images import height_width
    from mlflow_icr.extraction.pipelines import load_denoiser
    from mlflow_icr.extraction.samplers import starting_noise

    saved = {role: checkpoints(halves.output_dir(role)) for role in ROLES}
    histories = {role: read_history(halves.output_dir(role)) for role in ROLES}
    common = sorted(set(saved[ROLES[0]]) & set(saved[ROLES[1]]))
    if not common:
        raise ValueError(f"study_dir is {str(halves.folder)!r}, whose runs have no checkpoint at the same images seen")
    config, comparisons, noise = halves.configs[ROLES[0]], [], None
    for images_seen in common:
        pictures, states, copies = [], [], []
        for role in ROLES:
            denoiser, size = load_denoiser(saved[role][images_seen], trust_remote_code=True)  # what trainers.train wrote
            if noise is None:
                noise = starting_noise(range(SAMPLES), (channels_of(denoiser), *height_width(size)), config.run.seed)
            pictures.append(drawn(denoiser, noise, config.monitor.sample_steps))
            rows = [row for row in histories[role] if row["images_seen"] <= images_seen]
            states.append(verdict(rows).state)
            copies.append(rows[-1].get("mem/ratio_l2", math.nan) if rows else math.nan)
        result = agreement(*pictures)
        comparisons.append(
            Compared(images_seen, result.value, result.low, result.high, states[0], states[1], copies[0], copies[1])
        )
    return comparisons


def channels_of(denoiser: Denoiser) -> int:
    """The channels of the images that a saved network draws."""
    config: Any = denoiser.network.config
    return int(config["in_channels"])


def drawn(denoiser: Denoiser, noise: Tensor, num_steps: int) -> Tensor:
    """Pictures (M, C, H, W) in [-1, 1] from unit noise of that shape."""
    from mlflow_icr.extraction.denoisers import evaluating
    from mlflow_icr.extraction.samplers import sample

    with evaluating(denoiser.network):
        return sample(denoiser, noise, num_steps=num_steps).clamp(-1, 1)


def _draw(axes: Axes, comparisons: Sequence[Compared]) -> None:
    x = [c.images_seen / 1000 for c in comparisons]
    axes.plot(x, [c.agreement for c in comparisons], "o-", color="black", label="agreement of the halves")
    axes.fill_between(x, [c.low for c in comparisons], [c.high for c in comparisons], color="0.85")
    for i, name in enumerate(FOLDERS.values()):
        copies = [getattr(c, f"copies_{name}") for c in comparisons]
        axes.plot(x, copies, color=COLOURS[i], label=f"share of copies, {ROLES[i]}")
        states = [getattr(c, f"verdict_{name}") for c in comparisons]
        for place in range(1, len(comparisons)):
            if states[place] != states[place - 1]:
                axes.axvline(x[place], color=COLOURS[i], linestyle=":", linewidth=1)
                axes.text(x[place], 1.02 + 0.05 * i, states[place], color=COLOURS[i], rotation=0, fontsize=8)
    axes.set_xscale("log")
    axes.set_ylim(-0.1, 1.15)
    axes.set_xlabel("images seen (thousands)")
    axes.grid(alpha=0.2)
    axes.legend(loc="lower left")


def write(halves: Halves, comparisons: Sequence[Compared]) -> list[Path]:
    """Table and figure in the study's folder."""
    from matplotlib.figure import Figure

    sheet, picture = halves.folder / TABLE, halves.folder / PICTURE
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Compared)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(c) for c in comparisons)
    figure = Figure(figsize=(8, 5), layout="constrained")
    _draw(figure.subplots(), [c for c in comparisons if c.images_seen])
    figure.savefig(picture, dpi=130)
    return [sheet, picture]


def text(comparisons: Sequence[Compared]) -> str:
    """The results, in lines; both networks begin with the same weights, so that step 0 says nothing."""
    trained = [c for c in comparisons if c.images_seen] or comparisons
    best, last = max(trained, key=lambda c: c.agreement), comparisons[-1]
    interval = f"({best.low:.2f} to {best.high:.2f})"
    lines = [f"agreement is highest at {best.images_seen:,} images seen, {best.agreement:.2f} {interval}"]
    lines.append(f"at the end, {last.images_seen:,}, it is {last.agreement:.2f} ({last.low:.2f} to {last.high:.2f})")
    for i, name in enumerate(FOLDERS.values()):
        turn = next((c.images_seen for c in comparisons if getattr(c, f"verdict_{name}") in ("turning", "memorizing")), None)
        state = getattr(last, f"verdict_{name}")
        lines.append(f"{ROLES[i]}: {state}" + ("" if turn is None else f", first said at {turn:,}"))
    return "\n".join(lines)


def conclude(halves: Halves) -> None:
    """Compare the halves, print the results, and log them to an MLflow run of their own."""
    from mlflow_icr.tracking import MLflowSink, Tracker

    comparisons = compare(halves)
    files = write(halves, comparisons)
    tracker = Tracker(halves.folder / "agreement", [MLflowSink(run_name=f"{halves.name} agreement")], resume="allow")
    first = halves.configs[ROLES[0]]
    params = {name: first.get(name) for name in ("preset", "num_images", "total_kimg", "seed")}
    tracker.open(params, {"role": "split_halves", "study_name": halves.name})
    for c in comparisons:
        values = {"halves/agreement": c.agreement, "halves/agreement_low": c.low, "halves/agreement_high": c.high}
        copies = {"halves/copies_first": c.copies_first, "halves/copies_second": c.copies_second}
        tracker.metrics(values | {key: value for key, value in copies.items() if math.isfinite(value)}, c.images_seen)
    for path in files:
        tracker.artifact(path)
    tracker.close("FINISHED")
    print(f"\n{text(comparisons)}\n\ntable        {files[0]}\nfigure       {files[1]}")


def _flags(halves: Halves, role: str) -> list[str]:
    colour = COLOURS[ROLES.index(role)]
    return [
        *config_flags(halves.configs[role]),
        f"--output-dir={halves.output_dir(role)}",
        f"--run-name={role} n={halves.configs[role].data.num_images}",
        *(f"--tag={tag}" for tag in (f"study={halves.name}", f"role={role}", f"mlflow.runColor={colour}")),
    ]


def train(halves: Halves, stop: Stop) -> int:
    """Train both halves; returns 0, 1 when one failed, or 128 + signal when stopped."""
    halves.folder.mkdir(parents=True, exist_ok=True)
    siblings = [Sibling(role, halves.output_dir(role), _flags(halves, role)) for role in ROLES]
    ended = run_siblings(siblings, halves.parallel, lambda: stop.signal is not None)
    if stop.signal is not None:
        return 128 + stop.signal
    return 0 if len(ended) == len(siblings) and all(outcome.status == FINISHED for outcome in ended.values()) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 when a run failed, 2 for bad input, 128 + signal when stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        halves = plan(argv)
        trained = all((halves.output_dir(role) / HISTORY).exists() for role in ROLES)
        if not trained and (status := train(halves, Stop())):
            return status
        conclude(halves)
    except (ValueError, OSError) as error:
        print(f"split_halves: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())

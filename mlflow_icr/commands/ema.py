"""The command `mlflow-icr ema`: the average of weights of any relative width, reconstructed from a run's snapshots."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlflow_icr.commands.console import Commands, add_command, echo


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "ema",
        "reconstruct an average of weights of any width, from a run's snapshots",
        "Reconstruct the average of weights of any relative width (post-hoc EMA, Karras et al. 2024) from the snapshots of a "
        "run, and save it as a diffusers folder.",
        "mlflow-icr ema outputs/first/checkpoints --std 0.05",
    )
    parser.add_argument(
        "checkpoints", type=Path, metavar="CHECKPOINTS", help="the checkpoints/ of a run that had --power-ema-stds"
    )
    parser.add_argument("--std", type=float, required=True, metavar="X", help="relative width of the average, such as 0.05")
    parser.add_argument(
        "--images-seen", type=int, metavar="N", help="images seen at the end of the average; default: the last snapshot's"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="a new folder; default: ema-X beside the checkpoints")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from safetensors.torch import save_file

    from mlflow_icr.extraction.averages import WEIGHTS, Profile, check_std, reconstructed, snapshots_of
    from mlflow_icr.tracking.checkpoints.best import check_output
    from mlflow_icr.tracking.checkpoints.folder import copy_pipeline

    check_std("std", arguments.std)
    snapshots = snapshots_of(arguments.checkpoints)
    newest = max(snapshots, key=lambda profile: profile.images_seen)
    wanted = Profile(arguments.std, newest.images_seen if arguments.images_seen is None else arguments.images_seen)
    output = arguments.output or snapshots[newest].parents[2] / f"ema-{arguments.std:g}"
    check_output(output)
    components, error = reconstructed(snapshots, wanted)
    copy_pipeline(snapshots[newest].parent, output)
    for component, tensors in components.items():
        save_file(tensors, output / component / WEIGHTS, metadata={"format": "pt"})
    echo(
        f"relative width {arguments.std:g} at {wanted.images_seen:.0f} images, from {len(snapshots)} snapshots; "
        f"their sum differs from the wanted profile by {100 * error:.2g} %"
    )
    print(output)
    return 0

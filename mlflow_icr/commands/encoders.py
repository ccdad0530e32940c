"""The command `mlflow-icr encoders`: list the encoders, and download one. No other command downloads weights of encoders."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from mlflow_icr.commands.console import Commands, add_command, echo

if TYPE_CHECKING:
    from mlflow_icr.extraction.downloads import Progress
    from mlflow_icr.extraction.encoder_files import KeptEncoder, RemoteFile

DESCRIPTION = (
    "List the encoders in which images are compared, or download one. Only `encoders fetch` downloads anything. Files are "
    "kept in the cache (~/.cache/mlflow-icr, or $MLFLOW_ICR_CACHE), and their SHA-256 is checked. An interrupted download "
    "resumes. After that, `--encoder NAME` needs no path."
)


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "encoders",
        "list the encoders in which images are compared, or download one",
        DESCRIPTION,
        "mlflow-icr encoders list",
        "mlflow-icr encoders fetch inception",
        "mlflow-icr measure --generated samples/ --train images/ --encoder inception   # FID",
    )
    parser.add_argument("action", choices=["list", "fetch"], help="list all encoders, or download those that are named")
    parser.add_argument("names", nargs="*", metavar="NAME", help="inception, sscd, dinov2 or clip")
    parser.add_argument(
        "--sha256", metavar="DIGEST", help="SHA-256 that the weights must have; for weights without a published checksum"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.extraction.encoder_files import ENCODER_FILES

    unknown = next((name for name in arguments.names if name not in ENCODER_FILES), None)
    if unknown is not None:
        raise ValueError(f"encoder is {unknown!r}; expected one of {', '.join(ENCODER_FILES)}")
    if arguments.action == "list":
        return _list(arguments.names or list(ENCODER_FILES))
    if not arguments.names:
        raise ValueError(f"no encoder is named; expected one of {', '.join(ENCODER_FILES)}")
    if arguments.sha256 is not None:
        if len(arguments.names) > 1:
            raise ValueError(f"sha256 is given for {len(arguments.names)} encoders; expected one encoder with it")
        if not re.fullmatch("[0-9a-fA-F]{64}", arguments.sha256):
            raise ValueError(f"sha256 is {arguments.sha256!r}; expected 64 hexadecimal digits")
    for name in arguments.names:
        _fetch(name, arguments.sha256 or "")
    return 0


def _list(names: list[str]) -> int:
    from mlflow_icr.extraction.encoder_files import ENCODER_FILES, kept_encoder
    from mlflow_icr.extraction.encoder_weights import WEIGHTS

    for name in names:
        kept, weights = kept_encoder(name), ENCODER_FILES[name][-1]
        state = "not here" if kept is None else f"{kept.path} ({_checked(kept)})"
        checksum = weights.sha256 or "none is known"
        print(f"{name}\n  kept      {state}\n  from      {weights.url}")
        print(f"  SHA-256   {checksum}\n  licence   {WEIGHTS[name].licence}")
    return 0


def _checked(kept: KeptEncoder) -> str:
    return "checked" if kept.verified else "its checksum is not a known one"


def _fetch(name: str, sha256: str) -> None:
    from mlflow_icr.extraction.encoder_files import ENCODER_FILES, fetch_encoder, kept_encoder
    from mlflow_icr.extraction.encoder_weights import WEIGHTS

    before, weights = kept_encoder(name), ENCODER_FILES[name][-1]
    echo(f"{name}: {weights.url} ({WEIGHTS[name].licence})")
    kept = fetch_encoder(name, sha256=sha256, progress=_bar)
    digest = kept.sums[weights.name]
    if kept.verified or sha256:
        echo(f"{name}: SHA-256 {digest}, as expected")
    elif before is not None:
        echo(f"{name}: SHA-256 {digest}, as when it was first fetched; no published checksum is known")
    else:
        echo(f"{name}: SHA-256 {digest}, UNVERIFIED: no published checksum is known. Compare it with one you trust (--sha256).")
    print(kept.path)


def _bar(file: RemoteFile) -> Progress:
    """A bar on a terminal; elsewhere a line for each tenth."""
    import sys

    from tqdm import tqdm

    if sys.stderr.isatty():
        bar = tqdm(desc=file.name, unit="B", unit_scale=True, unit_divisor=1024)

        def draw(received: int, total: int | None) -> None:
            bar.total = total
            bar.update(received - bar.n)
            if received == total:
                bar.close()

        return draw
    tenths = [-1]

    def print_tenth(received: int, total: int | None) -> None:
        if total and received * 10 // total > tenths[0]:
            tenths[0] = received * 10 // total
            echo(f"{file.name}: {received / 2**20:.1f} of {total / 2**20:.1f} MiB")

    return print_tenth

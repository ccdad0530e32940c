"""Host memory of a training set: the peak of loading it, hashing it and training on it, as a share of its bytes.

Images are colour PNG files of noise over a ramp, made in a temporary folder first. A fresh process loads them as a training
does (folder, subset, SHA-256, duplicates), draws batches, and reports its peak resident memory: in all, and beyond that of the
imports. Pages of a mapped file count, although the system may drop them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.results import keep

GOAL = 1.2


def make(folder: Path, count: int, side: int) -> None:
    ramp = np.add.outer(np.arange(side), np.arange(side)) % 256
    for i in range(count):
        picture = np.stack([(ramp + i) % 256, (ramp + 3 * i // 2) % 256, (ramp + i // 256) % 256], axis=2)
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i:06}.png", compress_level=1)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def load(folder: Path, count: int, side: int) -> None:
    """In a process of its own: load, and draw batches; prints one JSON line."""
    import torch

    from trainers.batches import Order, draw_batch
    from trainers.config import load_config
    from trainers.data import data_of
    from trainers.families import family_of
    from trainers.inputs import Inputs

    config = load_config(
        "digits",
        {
            "data": str(folder),
            "resolution": side,
            "num_images": count - 10,
            "num_heldout": 10,
            "batch_size": 8,
            "labels": False,
        },
    )
    before, started = peak(), time.perf_counter()
    data = data_of(config)
    seconds = time.perf_counter() - started
    inputs, family = Inputs(data.train).to(torch.device("cpu")), family_of(config, None)
    for images_seen in range(0, 80, 8):
        draw_batch(inputs, Order(count - 10, 0), family, images_seen).clean(inputs)
    size = sum(images.numel() * images.element_size() for images in (data.train, data.heldout))
    print(json.dumps({"bytes": size, "peak": peak(), "imports": before, "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        load(arguments.folder, arguments.images, arguments.side)
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), arguments.images, arguments.side)
        # As a module: the files of a script's own folder would come before packages of the same name.
        flags = [f"--folder={folder}", f"--images={arguments.images}", f"--side={arguments.side}"]
        command = [sys.executable, "-m", "benchmarks.host_memory", *flags]
        completed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        usage = json.loads(completed.stdout.splitlines()[-1])
    print(
        f"{arguments.images} images of {arguments.side}x{arguments.side}: {usage['bytes'] / 2**20:.0f} MiB, read in "
        f"{usage['seconds']:.1f} s; peak {usage['peak'] / usage['bytes']:.3f} times that, without the imports' "
        f"{usage['imports'] / 2**20:.0f} MiB {(usage['peak'] - usage['imports']) / usage['bytes']:.3f} (goal: at most {GOAL})"
    )
    if (arguments.images, arguments.side) == (5000, 512):  # imports weigh more beside fewer bytes
        keep(
            host_memory=usage["peak"] / usage["bytes"],
            host_memory_without_imports=(usage["peak"] - usage["imports"]) / usage["bytes"],
            host_memory_imports_mib=usage["imports"] / 2**20,
        )


if __name__ == "__main__":
    main()

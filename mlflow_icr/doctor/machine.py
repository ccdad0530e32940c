"""The machine: devices, threads, disk, and the folder that embeddings are kept in."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlflow_icr.doctor.check import BAD, OK, WARN, Check, first_line
from mlflow_icr.environment import WAIT_VARIABLES, cores, thread_waiting

GIB = 2**30
LITTLE_DISK, TOO_LITTLE_DISK = 5 * GIB, GIB // 2  # a study of the demo leaves 0.2 GiB, one on photographs several
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def devices() -> Iterator[Check]:
    """The devices that torch can compute on, with their memory."""
    mend = "install torch again, as https://pytorch.org/get-started says for this machine"
    try:
        import torch
    except Exception as error:  # a missing library of torch is an OSError, a symbol of another version an ImportError
        yield Check("devices", BAD, f"torch cannot be imported: {first_line(error)}", mend)
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Check(f"device cuda:{index}", OK, f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
        return
    if torch.backends.mps.is_available():
        yield Check("device mps", OK, f"Apple GPU, {_memory()} shared with the CPU")
        return
    if NVIDIA_DRIVER.exists():
        text = f"there is an NVIDIA driver, but torch {torch.__version__} does not reach a GPU"
        yield Check("device cuda", WARN, text, mend)
    yield Check("device cpu", OK, f"{cores()} cores, {_memory()}, {torch.get_num_threads()} threads")


def threads() -> Iterator[Check]:
    """Whether a training's threads sleep or spin while they wait."""
    waiting = any(name in os.environ for name in WAIT_VARIABLES)
    if not waiting or thread_waiting() == "passive":  # the trainers choose passive waiting by default
        yield Check("threads", OK, "sleep while they wait in the trainers: several trainings can share these cores")
        return
    mend = f"export OMP_WAIT_POLICY=passive, and unset {' and '.join(WAIT_VARIABLES[1:])}"
    yield Check("threads", WARN, "spin while they wait: two trainings on the same cores are very slow", mend)


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.1f} GiB of memory"
    except (ValueError, OSError, AttributeError):
        return "memory unknown"


def disk(folder: Path) -> Iterator[Check]:
    """Free space where runs are written."""
    free = shutil.disk_usage(_existing(folder)).free
    state = BAD if free < TOO_LITTLE_DISK else WARN if free < LITTLE_DISK else OK
    mend = "" if state == OK else "make room, or write elsewhere (--output-dir)"
    yield Check("disk", state, f"{free / GIB:.1f} GiB free at {folder.resolve()}", mend)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest existing one above it."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def cache() -> Iterator[Check]:
    """Whether the folder of kept embeddings is writable, and how large it is."""
    from mlflow_icr.extraction.files import CACHE_VARIABLE, cache_folder

    folder = cache_folder()
    if folder is None:
        yield Check("cache", OK, f"off ({CACHE_VARIABLE})")
        return
    mend = f"make it writable, or name another folder with {CACHE_VARIABLE}"
    if folder.exists() and not folder.is_dir():
        yield Check("cache", WARN, f"{folder} is no folder: embeddings are computed each time", mend)
        return
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        yield Check("cache", WARN, f"{folder} cannot be written ({error.strerror}): embeddings are computed each time", mend)
        return
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    yield Check("cache", OK, f"{folder}, {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB")

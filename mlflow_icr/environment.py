"""Tags for a run's environment: versions, number of processes, GPUs. Loads neither torch nor MLflow."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from mlflow_icr.version import __version__

PACKAGES = ("torch", "accelerate", "diffusers")
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
MOST_TEXT = 8000  # characters that MLflow takes for a tag's value


def cores() -> int:
    """The number of cores that this process may use; all cores where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wait_passively() -> None:
    """Have OpenMP's threads sleep while they wait for each other, unless the environment says how they should.

    By default they spin: two trainings on the same two cores, with two threads each, then reach 5 to 120 images/s, where one
    alone reaches 300. torch reads the environment when it is loaded; if it is loaded already, nothing is changed.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAIT_VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def thread_waiting() -> str:
    """How OpenMP's threads wait: `passive` (they sleep) or `active` (they spin, at least for a while), by the environment."""
    spins, blocktime = os.environ.get("GOMP_SPINCOUNT", ""), os.environ.get("KMP_BLOCKTIME", "")
    if spins or blocktime:  # GNU's and Intel's own, which have precedence
        return "passive" if {spins, blocktime} <= {"", "0"} else "active"
    return "passive" if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" else "active"


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    """Versions of packages, from their metadata: none of them is imported."""
    versions = {"version": __version__}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _cuda_version(torch_version: str) -> str | None:
    """The CUDA version that torch was built with: from torch where it is loaded, else from a version such as 2.8.0+cu128."""
    with suppress(AttributeError):
        return sys.modules["torch"].version.cuda if "torch" in sys.modules else _from_label(torch_version)
    return None


def _from_label(torch_version: str) -> str | None:
    match = re.search(r"\+cu(\d+)(\d)$", torch_version)
    return f"{match[1]}.{match[2]}" if match else None


def _gpus() -> str | None:
    """Names of the GPUs, where this process uses them already.

    Asking torch for a name starts CUDA, which takes memory on the first GPU and makes forked children unable to use any.
    """
    torch = sys.modules.get("torch")
    with suppress(AttributeError, RuntimeError, AssertionError):  # torch may be half imported, or its driver gone
        if torch is not None and torch.cuda.is_initialized():
            names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            return ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names))) or None
    return None


def environment_tags() -> dict[str, str]:
    """The tags `icr.*`: versions, processes and GPUs; those that are not known are left out. Never raises."""
    tags: dict[str, str | None] = {**_versions()}
    tags["cuda"] = _cuda_version(tags.get("torch") or "")
    size = os.environ.get("WORLD_SIZE", "")
    tags["world_size"] = size if size.isdecimal() else None
    tags["gpus"] = _gpus()
    return {f"icr.{key}": value[:MOST_TEXT] for key, value in tags.items() if value}


_OURS: ContextVar[bool] = ContextVar("ours", default=False)


@contextmanager
def ours() -> Iterator[None]:
    """A context in which runs that this thread makes count as this package's, and get `environment_tags`."""
    before = _OURS.set(True)
    try:
        yield
    finally:
        _OURS.reset(before)


def is_ours() -> bool:
    """Whether a run that is made now is one of this package's."""
    return _OURS.get()

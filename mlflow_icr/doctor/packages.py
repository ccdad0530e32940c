"""Whether Python, this package and its requirements are installed, in the right versions."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mlflow_icr.doctor.check import BAD, OK, WARN, Check
from mlflow_icr.version import __version__

DISTRIBUTION = "mlflow-icr"
NAMED = ("torch", "mlflow", "diffusers", "accelerate", "datasets")  # a line each; the others share one
DEVELOPMENT = "dev"  # an extra that a user may not need


def python() -> Iterator[Check]:
    """Whether Python's version is one that the package allows."""
    asked = metadata(DISTRIBUTION)["Requires-Python"] or ""
    python_version = platform.python_version()
    fits = SpecifierSet(asked).contains(python_version, prereleases=True)
    mend = "" if fits else f"expected {asked}: make an environment with such a Python"
    yield Check("python", OK if fits else BAD, f"{python_version} at {sys.executable}", mend)


def package() -> Iterator[Check]:
    """Whether the installed package is the code that runs."""
    place = Path(__file__).resolve().parents[1]
    try:
        installed = version(DISTRIBUTION)
    except PackageNotFoundError:
        mend = f"pip install -e {place.parent}"
        yield Check(DISTRIBUTION, BAD, f"{__version__} at {place} is not installed: MLflow does not find its plugins", mend)
        return
    if installed != __version__:
        text = f"the code at {place} is {__version__}, but {installed} is installed"
        yield Check(DISTRIBUTION, BAD, text, f"pip install -e {place.parent}, or start from the environment that is meant")
    else:
        yield Check(DISTRIBUTION, OK, f"{installed} at {place}")


def _requirements() -> Iterator[tuple[Requirement, str]]:
    """The package's requirements, with the name of the extra that needs each, or an empty one."""
    for text in requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement, ""
            continue
        for extra in metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
            if extra != DEVELOPMENT and requirement.marker.evaluate({"extra": extra}):
                yield requirement, extra
                break


def _installed_version(requirement: Requirement) -> str | None:
    try:
        return version(requirement.name)
    except PackageNotFoundError:
        return None


def required() -> Iterator[Check]:
    """Every required package: its version, or how to install one that fits."""
    others = []
    for requirement, extra in _requirements():
        if extra or requirement.name == DISTRIBUTION:
            continue
        installed = _installed_version(requirement)
        asked = f"{requirement.name}{requirement.specifier}"
        if installed is None:
            yield Check(requirement.name, BAD, "is not installed", f'pip install "{asked}"')
        elif not requirement.specifier.contains(installed, prereleases=True):
            yield Check(requirement.name, BAD, f"{installed}; expected {requirement.specifier}", f'pip install "{asked}"')
        elif requirement.name in NAMED:
            yield Check(requirement.name, OK, installed)
        else:
            others.append(f"{requirement.name} {installed}")
    if others:
        yield Check("other packages", OK, ", ".join(others))


def optional() -> Iterator[Check]:
    """The requirements of extras: a line for each extra that is incomplete."""
    missing: dict[str, list[str]] = {}
    extras: set[str] = set()
    for requirement, extra in _requirements():
        if not extra or requirement.name == DISTRIBUTION:
            continue
        extras.add(extra)
        installed = _installed_version(requirement)
        if installed is None:
            missing.setdefault(extra, []).append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(installed, prereleases=True):
            missing.setdefault(extra, []).append(f"{requirement.name} is {installed}; expected {requirement.specifier}")
    for extra, why in missing.items():
        yield Check(f"extra {extra}", WARN, ", ".join(why), f'to use it: pip install "{DISTRIBUTION}[{extra}]"')
    complete = sorted(extras - missing.keys())
    if complete:
        yield Check("extras", OK, ", ".join(complete))

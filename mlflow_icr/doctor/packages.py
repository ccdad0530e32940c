"""Python, this package and those that it needs: installed, and of the right versions."""

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
    """Python's version, against what the package asks for."""
    asked = metadata(DISTRIBUTION)["Requires-Python"] or ""
    found = platform.python_version()
    fits = SpecifierSet(asked).contains(found, prereleases=True)
    mend = "" if fits else f"expected {asked}: make an environment with such a Python"
    yield Check("python", OK if fits else BAD, f"{found} at {sys.executable}", mend)


def package() -> Iterator[Check]:
    """The installed package is the code that runs."""
    place = Path(__file__).resolve().parents[1]
    try:
        found = version(DISTRIBUTION)
    except PackageNotFoundError:
        mend = f"pip install -e {place.parent}"
        yield Check(DISTRIBUTION, BAD, f"{__version__} at {place} is not installed: MLflow does not find its plugins", mend)
        return
    if found != __version__:
        text = f"the code at {place} is {__version__}, but {found} is installed"
        yield Check(DISTRIBUTION, BAD, text, f"pip install -e {place.parent}, or start from the environment that is meant")
    else:
        yield Check(DISTRIBUTION, OK, f"{found} at {place}")


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


def _found(requirement: Requirement) -> str | None:
    try:
        return version(requirement.name)
    except PackageNotFoundError:
        return None


def required() -> Iterator[Check]:
    """Every package that is needed: its version, where that fits."""
    fine = []
    for requirement, extra in _requirements():
        if extra or requirement.name == DISTRIBUTION:
            continue
        found = _found(requirement)
        asked = f"{requirement.name}{requirement.specifier}"
        if found is None:
            yield Check(requirement.name, BAD, "is not installed", f'pip install "{asked}"')
        elif not requirement.specifier.contains(found, prereleases=True):
            yield Check(requirement.name, BAD, f"{found}; expected {requirement.specifier}", f'pip install "{asked}"')
        elif requirement.name in NAMED:
            yield Check(requirement.name, OK, found)
        else:
            fine.append(f"{requirement.name} {found}")
    if fine:
        yield Check("other packages", OK, ", ".join(fine))


def optional() -> Iterator[Check]:
    """The requirements of extras: a line for each extra that is incomplete."""
    missing: dict[str, list[str]] = {}
    there: set[str] = set()
    for requirement, extra in _requirements():
        if not extra or requirement.name == DISTRIBUTION:
            continue
        there.add(extra)
        found = _found(requirement)
        if found is None:
            missing.setdefault(extra, []).append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(found, prereleases=True):
            missing.setdefault(extra, []).append(f"{requirement.name} is {found}; expected {requirement.specifier}")
    for extra, why in missing.items():
        yield Check(f"extra {extra}", WARN, ", ".join(why), f'where it is wanted: pip install "{DISTRIBUTION}[{extra}]"')
    whole = sorted(there - missing.keys())
    if whole:
        yield Check("extras", OK, ", ".join(whole))

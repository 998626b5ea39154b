"""Requirements of a Python distribution, and the versions that are installed."""

from __future__ import annotations

import re
from importlib import metadata

DISTRIBUTION = "minillm-mpi"
"""Name under which pip installs minillm."""


def parse_requirement(line: str) -> tuple[str, str, str]:
    """Split 'numpy>=1.26; extra == "x"' into name, least version and extra, each '' if absent."""
    requirement, _, condition = line.partition(";")
    name = re.match(r"[\w.-]+", requirement)
    least = re.search(r">=\s*([\d.]+)", requirement)
    extra = re.search(r"extra == ['\"]([\w-]+)['\"]", condition)
    return name[0] if name else requirement, least[1] if least else "", extra[1] if extra else ""


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def own_version() -> str:
    """Return the version of minillm, in words where it is not installed.

    It is not read from the package: above a clone named minillm, its folder stands for that.
    """
    return installed_version(DISTRIBUTION) or "(not installed)"


def new_enough(version: str | None, least: str) -> bool:
    """Return True for a version not older than `least`, by its leading numbers."""
    return version is not None and _numbers(version) >= _numbers(least)


def _numbers(version: str) -> tuple[int, ...]:
    leading = re.match(r"[\d.]*", version)
    return tuple(int(part) for part in (leading[0] if leading else "").split(".") if part)

"""Python and library versions against the package's requirements. Imports none of the libraries: they may be broken."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lowlevel.preflight.finding import Finding, fail, note, ok

PACKAGE = "lowlevel"
NAMED = ("torch", "transformers", "peft", "bitsandbytes")  # their versions are shown if all are well
PROJECT = Path(__file__).parents[2] / "pyproject.toml"  # in a checkout
NOT_INSTALLED = note(
    f"{PACKAGE} is not installed and has no pyproject.toml, so the versions that it needs are unknown",
    "pip install . in its repository",
)


@dataclass(frozen=True)
class Needs:
    """Requirements of the package on this system, without extras, and where they were read."""

    python: str
    libraries: list[Requirement]
    source: str

    @classmethod
    def of(cls, python: str, lines: Sequence[str], source: str) -> Needs:
        """From the line of each library."""
        read = [Requirement(line) for line in lines]
        return cls(python, [one for one in read if one.marker is None or one.marker.evaluate({"extra": ""})], source)


def needs() -> Needs | None:
    """From the installed package's metadata, else from the pyproject.toml of a checkout; None without both."""
    with suppress(metadata.PackageNotFoundError):
        python = metadata.metadata(PACKAGE)["Requires-Python"]
        return Needs.of(python, metadata.requires(PACKAGE) or [], "the package")
    try:
        project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
        found = Needs.of(project["requires-python"], project["dependencies"], PROJECT.name)
        return found if project["name"] == PACKAGE else None
    except (OSError, ValueError, KeyError):
        return None


def python() -> Finding:
    """The interpreter, and the range of `requires-python`."""
    asked = needs()
    if asked is None:
        return NOT_INSTALLED
    here = platform.python_version()
    found = f"{here} on {platform.system()} {platform.machine()}; {asked.source} asks for {asked.python}"
    if SpecifierSet(asked.python).contains(here, prereleases=True):
        return ok(found)
    return fail(found, "make an environment with a Python in that range")


def installed(name: str) -> str | None:
    """The version of a library; None if it is missing."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def libraries() -> Finding:
    """Libraries that are missing or outside the required range."""
    asked = needs()
    if asked is None:
        return NOT_INSTALLED
    found = {one.name: installed(one.name) or "" for one in asked.libraries}
    wrong = [
        one
        for one in asked.libraries
        if not (found[one.name] and one.specifier.contains(found[one.name], prereleases=True))
    ]
    if wrong:
        lines = [f"{one.name} {found[one.name] or 'is missing'} (asked for: {one.specifier})" for one in wrong]
        return fail("; ".join(lines), "pip install " + " ".join(f"'{one.name}{one.specifier}'" for one in wrong))
    named = ", ".join(f"{name} {found[name]}" for name in NAMED if name in found)
    return ok(f"all {len(found)} within the ranges of {asked.source}: {named}")


def missing() -> list[str]:
    """Names of missing libraries; the other checks need all of them."""
    asked = needs()
    return [one.name for one in asked.libraries if installed(one.name) is None] if asked else []

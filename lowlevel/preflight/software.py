"""Python and the libraries, against what the installed package asks for. Imports none of them: they may be broken."""

from __future__ import annotations

import platform
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lowlevel.preflight.finding import Answer, fail, note, ok

PACKAGE = "lowlevel"
NAMED = ("torch", "transformers", "peft", "bitsandbytes")  # whose versions are shown where all is well
NOT_INSTALLED = note(
    f"{PACKAGE} is not installed, so nothing says which versions it needs", "pip install . in its repository"
)


def python() -> Answer:
    """The interpreter, and the range of `requires-python`."""
    try:
        asked = metadata.metadata(PACKAGE)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED
    here = platform.python_version()
    found = f"{here} on {platform.system()} {platform.machine()}"
    if SpecifierSet(asked).contains(here, prereleases=True):
        return ok(f"{found}; the package asks for {asked}")
    return fail(f"{found}; the package asks for {asked}", "make an environment with a Python in that range")


def requirements() -> list[Requirement]:
    """What the package needs here: of its metadata's lines those without an extra and for this system.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    parsed = [Requirement(line) for line in metadata.requires(PACKAGE) or ()]
    return [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]


def versions(asked: list[Requirement]) -> dict[str, str | None]:
    """The installed version of each; None where it is missing."""
    found: dict[str, str | None] = {}
    for one in asked:
        try:
            found[one.name] = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            found[one.name] = None
    return found


def libraries() -> Answer:
    """Every library that is missing or out of the package's range."""
    try:
        asked = requirements()
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED
    found = versions(asked)
    wrong = [one for one in asked if not _fits(found[one.name], one.specifier)]
    if wrong:
        lines = [f"{one.name} {found[one.name] or 'is missing'} (asked for: {one.specifier})" for one in wrong]
        return fail("; ".join(lines), "pip install " + " ".join(f"'{one.name}{one.specifier}'" for one in wrong))
    named = ", ".join(f"{name} {found[name]}" for name in NAMED if name in found)
    return ok(f"all {len(asked)} within the package's ranges: {named}")


def missing() -> list[str]:
    """Names of the libraries that are not here at all; without them nothing else can be looked at."""
    try:
        return [name for name, version in versions(requirements()).items() if version is None]
    except metadata.PackageNotFoundError:
        return []


def _fits(version: str | None, specifier: SpecifierSet) -> bool:
    return version is not None and specifier.contains(version, prereleases=True)

"""The locks hold what pyproject.toml asks for, in exact versions with hashes, and nothing of torch's own."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = {
    "lock.txt": PROJECT["dependencies"],
    "lock-dev.txt": [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]],
}
# Written by PyPI's build of torch into its own requirements; which build is right depends on the machine.
TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")


def locked(name: str) -> list[tuple[Requirement, list[str]]]:
    """Each pinned requirement of a lock, with its hashes."""
    text = (ROOT / "runs" / name).read_text(encoding="utf-8").replace("\\\n", " ")
    entries = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(Requirement(line.split(" --hash")[0]), re.findall(r"--hash=(\S+)", line)) for line in entries]


def versions(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for requirement, _ in locked(name):
        found.setdefault(canonicalize_name(requirement.name), []).append(str(requirement.specifier).removeprefix("=="))
    return found


@pytest.mark.parametrize("name", NEEDED)
def test_each_dependency_is_locked_within_its_bounds(name):
    pinned = versions(name)
    pinned["torch"] = re.findall(r"^TORCH=(.+)$", (ROOT / "runs/setup.sh").read_text(), re.MULTILINE)
    for text in NEEDED[name]:
        requirement = Requirement(text)
        found = pinned[canonicalize_name(requirement.name)]
        assert found and all(requirement.specifier.contains(version) for version in found), f"{text}: {found}"


@pytest.mark.parametrize("name", NEEDED)
def test_each_line_is_one_exact_version_with_hashes(name):
    entries = locked(name)
    assert len(entries) >= 50
    for requirement, hashes in entries:
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)), requirement
        assert not (requirement.url or requirement.extras)
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in hashes), requirement
        assert not TORCH.fullmatch(requirement.name), requirement


def test_the_two_locks_agree():
    plain, dev = versions("lock.txt"), versions("lock-dev.txt")
    assert {name: dev[name] for name in plain} == plain
    assert dev.keys() > plain.keys()


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ("echo 'Found 1 known vulnerability in 1 package'; exit 1", 1, "Found 1 known vulnerability"),
        ("echo 'ERROR: ConnectionError: no route to host' >&2; exit 1", 0, "audit skipped: ERROR: ConnectionError"),
        ("sed 's/.*/& could not be audited/' ${!#}", 0, "knows none of the"),
        ("grep torch ${!#} | sed 's/.*/& could not be audited/'; exit 0", 0, "audit: no known vulnerability in "),
    ],
)
def test_the_audit_fails_on_a_finding_alone(tmp_path, script, code, message):
    """pip-audit's exit code is 1 for a vulnerability and for a service out of reach."""
    stand_in = tmp_path / "pip-audit"
    stand_in.write_text(f"#!/usr/bin/env bash\n{script}\n")
    stand_in.chmod(0o755)
    command = ["bash", str(ROOT / "runs/audit.sh")]
    said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_AUDIT": str(stand_in)})
    assert (said.returncode, message in said.stdout + said.stderr) == (code, True), said.stdout + said.stderr

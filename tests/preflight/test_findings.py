"""Lines of the table: errors become findings, secrets stay out; versions against ranges that are not this machine's."""

from pathlib import Path

import pytest

from lowlevel.errors import ConfigError
from lowlevel.preflight import software
from lowlevel.preflight.finding import Finding, fail, look, note, ok


def test_answers_keep_their_verdicts():
    assert look("a", lambda: ok("fine")) == Finding("a", "fine", "ok", "")
    assert look("a", lambda: note("slow", "buy")) == Finding("a", "slow", "note", "buy")
    assert look("a", lambda: fail("broken", "mend")) == Finding("a", "broken", "FAIL", "mend")


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (RuntimeError("no kernel image\nand a long traceback"), "RuntimeError: no kernel image"),
        (KeyError(), "KeyError: KeyError"),
        (ConfigError("bf16 needs compute capability 8.0"), "bf16 needs compute capability 8.0"),
    ],
)
def test_a_check_that_raises_is_a_failure_in_one_line(error, found):
    def check():
        raise error

    finding = look("device", check)
    assert (finding.found, finding.verdict) == (found, "FAIL") and finding.advice


def test_no_secret_and_no_control_character_reaches_a_finding(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "very-secret-value")
    finding = look("hub", lambda: note("https://me:" + "word@host/\x1b[2J", "unset very-secret-value"))
    assert "\x1b" not in finding.found and "word" not in finding.found
    assert finding.advice == "unset [redacted]"


# Versions


def asked(monkeypatch, *lines: str, **installed: str) -> None:
    """Metadata that asks for `lines`, on a machine that has `installed`."""

    def version(name: str) -> str:
        if name not in installed:
            raise software.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(software.metadata, "requires", lambda name: list(lines))
    monkeypatch.setattr(software.metadata, "version", version)


def test_this_environment_is_within_the_ranges():
    assert software.python().verdict == software.libraries().verdict == "ok"
    assert software.missing() == []


def test_a_library_out_of_its_range_and_one_that_is_missing(monkeypatch):
    asked(monkeypatch, "torch>=2.11,<2.15", "peft<0.22,>=0.21", "numpy>=2", torch="2.15.0+cu129", numpy="2.1")
    answer = software.libraries()
    assert answer.verdict == "FAIL"
    assert "torch 2.15.0+cu129 (asked for: <2.15,>=2.11)" in answer.found and "peft is missing" in answer.found
    assert "numpy" not in answer.found + answer.advice
    assert answer.advice == "pip install 'torch<2.15,>=2.11' 'peft<0.22,>=0.21'"
    assert software.missing() == ["peft"]


def test_a_build_of_torch_and_an_extra_that_nobody_asked_for(monkeypatch):
    lines = ("torch<2.15,>=2.11", 'pytest>=8; extra == "dev"', 'pywin32; sys_platform == "win32"')
    asked(monkeypatch, *lines, torch="2.11.0+cpu")
    assert software.libraries().verdict == "ok" and software.missing() == []


def test_a_python_out_of_its_range(monkeypatch):
    monkeypatch.setattr(software.platform, "python_version", lambda: "3.10.12")
    answer = software.python()
    assert answer.verdict == "FAIL" and "3.10.12" in answer.found and ">=3.11" in answer.found


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """A checkout that was not installed: its pyproject.toml is what a test writes, and beside it nothing is known."""

    def metadata(name: str) -> str:
        raise software.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(software.metadata, "metadata", metadata)
    monkeypatch.setattr(software, "PROJECT", tmp_path / "pyproject.toml")
    return tmp_path / "pyproject.toml"


def project(*lines: str, name: str = "lowlevel", python: str = ">=3.11") -> str:
    return f'[project]\nname = "{name}"\nrequires-python = "{python}"\ndependencies = {list(lines)}\n'


def test_a_checkout_that_is_not_installed_asks_for_what_its_pyproject_says(monkeypatch, checkout):
    checkout.write_text((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert [software.python().verdict, software.libraries().verdict] == ["ok", "ok"]
    assert software.python().found.endswith("; pyproject.toml asks for >=3.11")
    assert " within the ranges of pyproject.toml: torch " in software.libraries().found
    checkout.write_text(project("torch>=2.11,<2.15", "peft>=0.21", 'pywin32; sys_platform == "win32"', python=">=3.99"))
    asked(monkeypatch, torch="2.15.0")
    assert software.python().verdict == "FAIL" and software.python().found.endswith("asks for >=3.99")
    answer = software.libraries()
    assert answer.found == "torch 2.15.0 (asked for: <2.15,>=2.11); peft is missing (asked for: >=0.21)"
    assert answer.verdict == "FAIL" and software.missing() == ["peft"]


@pytest.mark.parametrize("text", [None, "[project", "[tool.ruff]", project("torch", name="another"), "[project]\n"])
def test_a_package_of_which_nothing_says_what_it_needs_is_a_note(checkout, text):
    if text is not None:
        checkout.write_text(text)
    assert software.python() == software.libraries() == software.NOT_INSTALLED
    assert software.NOT_INSTALLED.verdict == "note" and software.missing() == []

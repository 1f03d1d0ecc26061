"""Lines of the table: errors become findings, secrets stay out; versions against ranges that are not this machine's."""

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


def test_a_package_that_is_not_installed_is_a_note(monkeypatch):
    monkeypatch.setattr(software, "PACKAGE", "no-such-package-anywhere")
    assert software.python() == software.libraries() == software.NOT_INSTALLED
    assert software.NOT_INSTALLED.verdict == "note" and software.missing() == []

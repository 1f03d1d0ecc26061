"""Findings: the lines of `lowlevel doctor`'s table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lowlevel.errors import LowlevelError, one_line, printable
from lowlevel.redaction import redact

Verdict = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """The result of a check; `look` fills in its name, `what`."""

    what: str
    found: str
    verdict: Verdict
    advice: str


def ok(found: str) -> Finding:
    """All is well."""
    return Finding("", found, "ok", "")


def note(found: str, advice: str) -> Finding:
    """A run starts, but is slower or lacks something."""
    return Finding("", found, "note", advice)


def fail(found: str, advice: str) -> Finding:
    """A run would fail or be wrong."""
    return Finding("", found, "FAIL", advice)


def look(what: str, check: Callable[[], Finding]) -> Finding:
    """The finding of a check, without secrets and control characters. A check that raises is a FAIL."""
    try:
        answer = check()
    except LowlevelError as error:
        answer = fail(str(error), "a run would end with this error")
    except Exception as error:  # drivers, compilers and libraries raise any type
        answer = fail(f"{type(error).__name__}: {one_line(error)}", "a run would meet the same error")
    found, advice = (redact(printable(text)) for text in (answer.found, answer.advice))
    return Finding(what, found, answer.verdict, advice)

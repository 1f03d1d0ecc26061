"""Findings: the lines of `lowlevel doctor`'s table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lowlevel.errors import LowlevelError, one_line, printable
from lowlevel.redaction import redact

Verdict = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True)
class Answer:
    """The result of a check: its verdict, and advice if that is not ok.

    note: a run starts, but is slower or lacks something. FAIL: a run would fail or be wrong.
    """

    found: str
    verdict: Verdict
    advice: str = ""


@dataclass(frozen=True)
class Finding:
    """An answer and its name, without secrets and control characters."""

    what: str
    found: str
    verdict: Verdict
    advice: str


def ok(found: str) -> Answer:
    """All is well."""
    return Answer(found, "ok")


def note(found: str, advice: str) -> Answer:
    """A run starts, but is slower or lacks something."""
    return Answer(found, "note", advice)


def fail(found: str, advice: str) -> Answer:
    """A run would fail or be wrong."""
    return Answer(found, "FAIL", advice)


def look(what: str, check: Callable[[], Answer]) -> Finding:
    """The finding of a check. A check that raises is a FAIL, and the other checks still run."""
    try:
        answer = check()
    except LowlevelError as error:
        answer = fail(str(error), "a run would end with this error")
    except Exception as error:  # drivers, compilers and libraries raise any type
        answer = fail(f"{type(error).__name__}: {one_line(error)}", "a run would meet the same error")
    return Finding(what, _clean(answer.found), answer.verdict, _clean(answer.advice))


def _clean(text: str) -> str:
    return redact(printable(text))

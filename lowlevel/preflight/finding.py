"""A finding: one line of `lowlevel doctor`'s table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lowlevel.errors import LowlevelError, one_line, printable
from lowlevel.redaction import redact

Verdict = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True)
class Answer:
    """What a check found, its verdict, and what to do where that is not ok.

    ok: as it should be. note: a run starts, but is slower or lacks something. FAIL: a run would fail or be wrong.
    """

    found: str
    verdict: Verdict
    advice: str = ""


@dataclass(frozen=True)
class Finding:
    """An answer under its name. Holds no secret and no control character."""

    what: str
    found: str
    verdict: Verdict
    advice: str


def ok(found: str) -> Answer:
    """As it should be."""
    return Answer(found, "ok")


def note(found: str, advice: str) -> Answer:
    """A run starts."""
    return Answer(found, "note", advice)


def fail(found: str, advice: str) -> Answer:
    """A run would fail or be wrong."""
    return Answer(found, "FAIL", advice)


def look(what: str, check: Callable[[], Answer]) -> Finding:
    """The finding of a check; one that raises is a FAIL, and the table still gets its other lines."""
    try:
        answer = check()
    except LowlevelError as error:
        answer = fail(str(error), "a run would end with this error")
    except Exception as error:  # drivers, compilers and libraries raise whatever they like
        answer = fail(f"{type(error).__name__}: {one_line(error)}", "a run would meet the same error")
    return Finding(what, _clean(answer.found), answer.verdict, _clean(answer.advice))


def _clean(text: str) -> str:
    return redact(printable(text))

"""Errors meant for people: one line with the numbers, the row or key, and what to do. Each kind has its exit code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lowlevel.redaction import redact

_UNPRINTABLE = re.compile("[\\x00-\\x09\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")
EVAL_LOSS = "eval_loss"  # the quantity of a NonFiniteError that an evaluation raised
LONGEST_QUOTE = 80  # characters of a foreign value that a message quotes


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def quoted(text: str) -> str:
    """A value for a message: whole if it is short, else its beginning and its length."""
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}... ({len(text):,} characters)"


def printable(text: str) -> str:
    """The text with control characters (but line feeds) and halves of surrogate pairs escaped.

    A name from a data file must not move a terminal's cursor, nor keep its own error from being written.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class LowlevelError(Exception):
    """Base of all errors that the command line prints as one line, without a traceback.

    Its text also goes into run-status.json, so secrets are taken out where it is made.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        """`message` is what a person reads."""
        super().__init__(redact(printable(message)))


class ConfigError(LowlevelError):
    """A run file, flag or path that cannot be used as given."""

    exit_code = 2


class DataError(LowlevelError):
    """Training rows that cannot be used as given."""

    exit_code = 3


class CheckpointError(LowlevelError):
    """A model, adapter, checkpoint or run folder that is missing, damaged or does not fit."""

    exit_code = 4


class NonFiniteError(LowlevelError):
    """A loss or gradient that is not a finite number."""

    exit_code = 5

    def __init__(
        self,
        message: str,
        *,
        quantity: str = "",
        value: float = float("nan"),
        step: int = 0,
        seed: int = 0,
        batches: Sequence[Any] = (),
        attempts: Sequence[dict[str, float]] = (),
    ) -> None:
        """What the loop knows, for running/forensics.py: `step` from 0, `batches` of the step, scales tried so far.

        Of an evaluation, `step` is the last one before it and `batches` are the held-out ones.
        """
        super().__init__(message)
        self.quantity, self.value, self.step, self.seed = quantity, value, step, seed
        self.batches, self.attempts = batches, attempts


class OutOfMemoryError(LowlevelError):
    """The device ran out of memory."""

    exit_code = 6


class InterruptedRunError(LowlevelError):
    """The run was stopped by a signal; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        """`signum` is the signal that asked the run to stop."""
        super().__init__(message)
        self.exit_code = 128 + signum

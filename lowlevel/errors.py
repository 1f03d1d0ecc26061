"""Errors for users: one line with the numbers, the row or key, and what to do. Each kind has its exit code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lowlevel.redaction import redact

_UNPRINTABLE = re.compile("[\\x00-\\x09\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")
EVAL_LOSS = "eval_loss"  # quantity of a NonFiniteError in an evaluation
EVAL_REWARD = "eval_reward"  # what an online method has in its place
CONTINUE = "continue with --resume"
# Flags in messages, as the Python API has them.
_KEYWORDS = [
    (re.compile(rf"(?<![\w-])--{flag}"), keyword)
    for flag, keyword in (
        (r"(resume|restart)\b", r"\1=True"),
        (r"allow-change ([\w.]+)", r'allow_change=["\1"]'),
        (r"on-bad-row (\w+)", r'on_bad_row="\1"'),
        (r"from (\d+)", r"start=\1"),
        (r"(step|checkpoint) (\d+)", r"\1=\2"),
        (r"[a-z]+\.(\w+) (\w+)", r'\1="\2"'),
        (r"allow-change\b", "allow_change"),
        (r"what-if\b", "what_if:"),
    )
]
LONGEST_QUOTE = 80  # characters of an input value quoted in a message


def one_line(error: BaseException) -> str:
    """The first line of an error's message with what its colon announces, or its type if the message is empty."""
    lines = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines() if line.strip()]
    end = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: end + 1])


def quoted(text: str) -> str:
    """A value for a message: whole if short, else its start and its length."""
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}... ({len(text):,} characters)"


def how_many(number: float, things: str) -> str:
    """Such as "2,048 rows"; "1 row"."""
    return f"{number:,} {things if number != 1 else re.sub('(?<=ch)es$|s$', '', re.sub('ies$', 'y', things))}"


def printable(text: str) -> str:
    """The text with control characters (except line feeds) and lone surrogates escaped.

    A name from a data file must neither move the terminal's cursor nor make its own error message unwritable.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class LowlevelError(Exception):
    """Base of all errors that the command line prints as one line, without a traceback.

    The text also goes into run-status.json, so the constructor removes secrets.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(redact(printable(message)))


@contextmanager
def errors_for_python() -> Iterator[None]:
    """Name keywords of the Python API instead of flags in the error that leaves the block."""
    try:
        yield
    except LowlevelError as error:
        text = str(error)
        for flag, keyword in _KEYWORDS:
            text = flag.sub(keyword, text)
        error.args = (text,)
        raise


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
    """A loss or gradient that is NaN or infinite."""

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
        """For running/forensics.py: `step` from 0, `batches` of the step, loss scales tried so far.

        For an evaluation: the last step before it, and the held-out batches.
        """
        super().__init__(message)
        self.quantity, self.value, self.step, self.seed = quantity, value, step, seed
        self.batches, self.attempts = batches, attempts


class OutOfMemoryError(LowlevelError):
    """The device ran out of memory."""

    exit_code = 6


class RankError(LowlevelError):
    """A run on several GPUs ended because of one of them; `exit_code` is that rank's."""

    def __init__(self, message: str, code: int, *, rank: int | None = None, told: bool = False) -> None:
        """`rank`: the one that failed. `told`: another rank prints the message."""
        super().__init__(message)
        self.exit_code, self.rank, self.told = code, rank, told


class InterruptedRunError(LowlevelError):
    """The run was stopped by a signal; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum

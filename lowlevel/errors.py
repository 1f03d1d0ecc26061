"""Errors meant for people: one line with the numbers, the row or key, and what to do. Each kind has its exit code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class LowlevelError(Exception):
    """Base of all errors that the command line prints as one line, without a traceback."""

    exit_code = 1


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
        """What the loop knows, for `lowlevel.forensics`: `step` from 0, `batches` of the step, scales tried so far."""
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

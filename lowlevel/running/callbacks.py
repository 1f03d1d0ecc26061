"""Callbacks: what a program can do at the named moments of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowlevel.optim.train_state import StepResult


class Callback:
    """Base class of callbacks: override the moments you need.

    An exception that a callback raises ends the run with that exception.
    """

    def on_step(self, step: StepResult) -> None:
        """Called after each applied optimizer step, before its log line: its number, loss, metrics, rows and batches."""

    def on_log(self, record: Mapping[str, Any]) -> None:
        """Called for each training line of metrics.jsonl: step, epoch, loss, grad_norm, learning_rate, ..."""

    def on_evaluate(self, scores: Mapping[str, Any]) -> None:
        """Called for each evaluation line of metrics.jsonl: step, epoch, eval_loss, ...; step 0 is before training."""

    def on_save(self, path: Path) -> None:
        """Called when the checkpoint folder `path` (step-XXXXXXXX) is complete and on disk."""

    def on_end(self, run: Any) -> None:
        """Called once, when all files of a finished run are written; `run` is what `lowlevel.sft` or `dpo` returns."""

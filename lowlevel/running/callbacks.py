"""Callbacks: functions of a user that a run calls at named moments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowlevel.optim.train_state import StepResult


class Callback:
    """Override what is needed. An exception ends the run, as an error in training does; to stop and save, leave a loop
    over `lowlevel.steps`.
    """

    def on_step(self, step: StepResult) -> None:
        """Called after each applied optimizer step, before its log line."""

    def on_log(self, record: Mapping[str, Any]) -> None:
        """Called for each training line of metrics.jsonl: step, epoch, loss, grad_norm, learning_rate, ..."""

    def on_evaluate(self, scores: Mapping[str, Any]) -> None:
        """Called for each evaluation line of metrics.jsonl: step, epoch, eval_loss, ...; step 0 is before training."""

    def on_save(self, path: Path) -> None:
        """Called when the checkpoint folder `path` (step-XXXXXXXX) is complete and on disk."""

    def on_end(self, run: Any) -> None:
        """Called once, when all files of a finished run are written; `run` is the `lowlevel.Run`."""

"""Callbacks: functions of a user that a run calls at named moments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowlevel.api import Run
    from lowlevel.optim.train_state import StepResult


class Callback:
    """Override what is needed. An exception ends the run, as an error in training does."""

    def on_step(self, step: StepResult) -> None:
        """An optimizer step was applied."""

    def on_log(self, record: Mapping[str, Any]) -> None:
        """A line was added to metrics.jsonl: step, loss, metrics, learning rate, tokens a second."""

    def on_evaluate(self, scores: Mapping[str, Any]) -> None:
        """The held-out rows were evaluated: step and eval_* means."""

    def on_save(self, path: Path) -> None:
        """A checkpoint is complete."""

    def on_end(self, run: Run) -> None:
        """The run has finished, its result is written."""

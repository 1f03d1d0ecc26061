"""Receives what the loop of a run reports: metrics, checkpoints, status, the bar, and the user's callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lowlevel.checkpoints.checkpoint import checkpoints
from lowlevel.errors import EVAL_LOSS
from lowlevel.optim.train_state import StepResult, TrainState
from lowlevel.running.callbacks import Callback
from lowlevel.running.first_step import check_first_step, starts_as_reference
from lowlevel.running.interrupts import Interrupts
from lowlevel.running.job import Engine
from lowlevel.running.progress import TrainingProgress
from lowlevel.running.run_folder import RunFolder


@dataclass
class RunObserver:
    """Writes metrics, checkpoints and status, calls the callbacks, and passes signals on."""

    folder: RunFolder
    progress_bar: TrainingProgress
    engine: Engine
    interrupts: Interrupts
    note: Callable[[str], None]
    callbacks: Sequence[Callback] = ()

    def log(self, record: dict[str, Any]) -> None:
        """Append to metrics.jsonl, show, and hand to the callbacks."""
        self.folder.append_metrics(record)
        self.progress_bar.record(record)
        for callback in self.callbacks:
            (callback.on_evaluate if EVAL_LOSS in record else callback.on_log)(record)

    def progress(self, state: TrainState, result: StepResult) -> None:
        """Check the first step of a new run, move the bar, and hand the step to the callbacks."""
        if state.step == 1:
            self._check_first(result)
        self.progress_bar.step(state.step)
        for callback in self.callbacks:
            callback.on_step(result)

    def save(self, state: TrainState) -> None:
        """Sync the log's lines, write the checkpoint, then the status that names it."""
        self.folder.sync_metrics()
        self.engine.write_checkpoint(state)
        self.folder.write_status("running", state.step)
        for callback in self.callbacks:
            callback.on_save(next(iter(checkpoints(self.folder.path))))

    def stop_requested(self) -> int:
        """The first signal that came, or 0."""
        return self.interrupts.signum

    def _check_first(self, result: StepResult) -> None:
        config, precision = self.engine.job.config, self.engine.job.inputs.placement.precision
        line = check_first_step(result, config, precision) if starts_as_reference(config) else None
        if line:
            self.note(line)

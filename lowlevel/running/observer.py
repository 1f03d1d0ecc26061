"""What the loop reports to in a run: metrics, checkpoints, status and the bar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lowlevel.optim.train_state import StepResult, TrainState
from lowlevel.running.interrupts import Interrupts
from lowlevel.running.progress import TrainingProgress
from lowlevel.running.run_folder import RunFolder


@dataclass
class RunObserver:
    """Receives what the loop reports: writes metrics, checkpoints and status, and passes signals on."""

    folder: RunFolder
    progress_bar: TrainingProgress
    write_checkpoint: Callable[[TrainState], None]
    interrupts: Interrupts
    judge_first: Callable[[StepResult], None]  # step 1 of a new run: raises where it must not go on

    def log(self, record: dict[str, Any]) -> None:
        """Append to metrics.jsonl and show."""
        self.folder.append_metrics(record)
        self.progress_bar.record(record)

    def progress(self, state: TrainState, result: StepResult) -> None:
        """Move the bar."""
        if state.step == 1:
            self.judge_first(result)
        self.progress_bar.step(state.step)

    def save(self, state: TrainState) -> None:
        """Sync the log's lines, write the checkpoint, then the status that names it."""
        self.folder.sync_metrics()
        self.write_checkpoint(state)
        self.folder.write_status("running", state.step)

    def stop_requested(self) -> int:
        """The first signal that came, or 0."""
        return self.interrupts.signum

"""What the loop reports to in a run: metrics, checkpoints, status, the bar, and signals."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lowlevel.metrics import StepResult, TrainState
from lowlevel.progress import TrainingProgress
from lowlevel.run_folder import RunFolder


@dataclass
class RunObserver:
    """Receives what the loop reports: writes metrics, checkpoints and status, and remembers signals."""

    folder: RunFolder
    progress_bar: TrainingProgress
    write_checkpoint: Callable[[TrainState], None]
    signum: int = 0

    def log(self, record: dict[str, Any]) -> None:
        """Append to metrics.jsonl and show."""
        with open(self.folder.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.progress_bar.record(record)

    def progress(self, state: TrainState, result: StepResult) -> None:
        """Move the bar."""
        self.progress_bar.step(state.step)

    def save(self, state: TrainState) -> None:
        """Write a checkpoint, then the status that names it."""
        self.write_checkpoint(state)
        self.folder.write_status("running", state.step)

    def stop_requested(self) -> int:
        """The first signal that came, or 0."""
        return self.signum

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Receive SIGTERM and SIGINT; afterwards they do what they did before."""
        previous = {number: signal.signal(number, self.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def on_signal(self, signum: int, frame: object) -> None:
        """Ask the loop to stop at the next step boundary; a second signal ends the process at once."""
        if self.signum:
            raise SystemExit(128 + signum)
        self.signum = signum

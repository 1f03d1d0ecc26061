"""Experiment trackers (train.report_to): callbacks that send metrics.jsonl to TensorBoard, W&B or Trackio.

No tracker's package is imported unless it is asked for. An exception of a tracker prints one line and drops that
tracker; the run continues.
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import tomli_w

from lowlevel.config.file import to_tables
from lowlevel.config.schema import RunConfig
from lowlevel.durable import write_text
from lowlevel.errors import ConfigError, one_line
from lowlevel.redaction import redact
from lowlevel.running.callbacks import Callback
from lowlevel.running.run_folder import TENSORBOARD, TRACKER_ID, RunFolder

PROJECT = "lowlevel"


class Backend(Protocol):
    """One tracker's run."""

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Send the scalars of one step."""

    def close(self) -> None:
        """Send what is left, and end the tracker's run."""


class Tracker(Callback):
    """Forwards log and evaluation lines as scalars, under their names in metrics.jsonl, to one tracker.

    The tracker's run begins in the constructor, with the run's configuration (secrets redacted). A resumed run
    continues the same tracker run.
    """

    def __init__(self, name: str, config: RunConfig, folder: Path, note: Callable[[str], None]) -> None:
        self.name, self.note = name, note
        self.backend: Backend | None = None
        with self._dropped_on_error():
            self.backend = BACKENDS[name](_redacted(to_tables(config)), folder)

    def on_log(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of a training line."""
        with self._dropped_on_error():
            if self.backend is not None:
                numbers = {k: v for k, v in record.items() if type(v) in (int, float) and k != "step"}
                self.backend.log(numbers, record["step"])

    def on_evaluate(self, scores: Mapping[str, Any]) -> None:
        """Send the numbers of an evaluation line."""
        self.on_log(scores)

    def close(self) -> None:
        """End the tracker's run; a second call does nothing."""
        backend, self.backend = self.backend, None
        with self._dropped_on_error():
            if backend is not None:
                backend.close()

    @contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # trackers raise their own kinds
            self.backend = None
            self.note(redact(f"warning: train.report_to: {self.name} failed and gets no more lines: {one_line(error)}"))


class TensorBoard:
    """Event files in RUN/tensorboard/. A resumed run hides the lines of steps that it repeats."""

    def __init__(self, tables: dict[str, Any], folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        records = RunFolder(folder).read_metrics()
        purge = records[-1]["step"] + 1 if records else None
        self.writer: Any = SummaryWriter(folder / TENSORBOARD, purge_step=purge)  # type: ignore[no-untyped-call]
        self.writer.add_text("configuration", f"```toml\n{tomli_w.dumps(tables)}```")

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Write a scalar event for each value, and flush."""
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


class WandB:
    """A run of Weights & Biases, project WANDB_PROJECT or "lowlevel". Repeated steps of a resumed run are ignored."""

    def __init__(self, tables: dict[str, Any], folder: Path) -> None:
        import wandb

        # Not sent: command line and environment (metadata), printed lines, code.
        settings = wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_meta=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=_tracker_id(folder),
            resume="allow",
            dir=str(folder),
            config=tables,
            settings=settings,
        )

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Send the scalars."""
        self.run.log(scalars, step=step)

    def close(self) -> None:
        """Upload what is left."""
        self.run.finish()


class Trackio:
    """A run of Trackio, project "lowlevel", in its local store. Repeated steps of a resumed run stand there twice."""

    def __init__(self, tables: dict[str, Any], folder: Path) -> None:
        import trackio

        self.run = trackio.init(
            project=PROJECT, name=_tracker_id(folder), resume="allow", config=tables, embed=False, auto_log_gpu=False,
            auto_log_cpu=False,
        )  # fmt: skip

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Store the scalars."""
        self.run.log(scalars, step=step)

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()


BACKENDS: dict[str, Callable[[dict[str, Any], Path], Backend]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def check_trackers(config: RunConfig) -> None:
    """Refuse a tracker whose package is not installed, before any work.

    Raises:
        ConfigError: with the command that installs it.
    """
    for name in config.train.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f'train.report_to: "{name}" is not installed: pip install "lowlevel[{name}]"')


@contextmanager
def open_trackers(config: RunConfig, folder: Path, note: Callable[[str], None]) -> Iterator[list[Tracker]]:
    """The trackers of train.report_to, closed when the block ends. A resumed run first cuts metrics.jsonl back."""
    trackers = [Tracker(name, config, folder, note) for name in dict.fromkeys(config.train.report_to)]
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.close()


def _tracker_id(folder: Path) -> str:
    """The name under which a resumed run finds its tracker run again, kept in the run folder."""
    file = folder / TRACKER_ID
    if not file.exists():
        write_text(file, f"{folder.resolve().name}-{uuid.uuid4().hex[:8]}\n")
    return file.read_text(encoding="utf-8").strip()


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value

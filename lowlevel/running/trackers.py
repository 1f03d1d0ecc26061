"""Experiment trackers (train.report_to): callbacks that send metrics.jsonl to TensorBoard, W&B or Trackio.

A tracker's package is imported only if train.report_to names it. An exception of a tracker prints one line and drops
that tracker; the run continues.
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from lowlevel.config.file import to_tables
from lowlevel.config.schema import RunConfig
from lowlevel.durable import write_text
from lowlevel.errors import ConfigError, one_line
from lowlevel.redaction import redact
from lowlevel.running.callbacks import Callback
from lowlevel.running.run_folder import TENSORBOARD, TRACKER_ID, RunFolder

PROJECT = "lowlevel"
Send = Callable[[dict[str, float], int], None]  # scalars by name, step
Close = Callable[[], None]


class Tracker(Callback):
    """Sends log and evaluation lines as scalars, under their names in metrics.jsonl, to one tracker.

    The constructor starts the tracker's run with the run's configuration (secrets redacted). A resumed run continues
    the same tracker run.
    """

    def __init__(self, name: str, config: RunConfig, folder: Path, note: Callable[[str], None]) -> None:
        self.name, self.note = name, note
        self.backend: tuple[Send, Close] | None = None
        with self._dropped_on_error():
            self.backend = BACKENDS[name](_redacted(to_tables(config)), folder)

    def on_log(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of a training line."""
        with self._dropped_on_error():
            if self.backend is not None:
                numbers = {k: v for k, v in record.items() if type(v) in (int, float) and k != "step"}
                self.backend[0](numbers, record["step"])

    def on_evaluate(self, scores: Mapping[str, Any]) -> None:
        """Send the numbers of an evaluation line."""
        self.on_log(scores)

    def close(self) -> None:
        """End the tracker's run; a second call does nothing."""
        backend, self.backend = self.backend, None
        with self._dropped_on_error():
            if backend is not None:
                backend[1]()

    @contextmanager
    def _dropped_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # trackers raise exceptions of many types
            self.backend = None
            self.note(redact(f"warning: train.report_to: {self.name} failed and gets no more lines: {one_line(error)}"))


def _tensorboard(tables: dict[str, Any], folder: Path) -> tuple[Send, Close]:
    """Event files in RUN/tensorboard/. A resumed run hides the lines of steps that it repeats."""
    from torch.utils.tensorboard import SummaryWriter

    records = RunFolder(folder).read_metrics()
    purge = records[-1]["step"] + 1 if records else None
    writer: Any = SummaryWriter(folder / TENSORBOARD, purge_step=purge)  # type: ignore[no-untyped-call]
    writer.add_text("configuration", f"```toml\n{tomli_w.dumps(tables)}```")

    def send(scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, writer.close


def _wandb(tables: dict[str, Any], folder: Path) -> tuple[Send, Close]:
    """A run of Weights & Biases, project WANDB_PROJECT or "lowlevel". Repeated steps of a resumed run are ignored."""
    import wandb

    # Not sent: command line and environment (metadata), printed lines, code.
    settings = wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_meta=True)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.name,
        id=_tracker_id(folder),
        resume="allow",
        dir=str(folder),
        config=tables,
        settings=settings,
    )
    return (lambda scalars, step: run.log(scalars, step=step)), run.finish


def _trackio(tables: dict[str, Any], folder: Path) -> tuple[Send, Close]:
    """A run of Trackio, project "lowlevel", in its local store. Repeated steps of a resumed run appear twice."""
    import trackio

    options = {"resume": "allow", "embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    run = trackio.init(project=PROJECT, name=_tracker_id(folder), config=tables, **options)
    return (lambda scalars, step: run.log(scalars, step=step)), run.finish


BACKENDS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def check_trackers(config: RunConfig) -> None:
    """Refuse a tracker whose package is not installed. Raises ConfigError with the command that installs it."""
    for name in config.train.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f'train.report_to: "{name}" is not installed: pip install "lowlevel[{name}]"')


@contextmanager
def open_trackers(config: RunConfig, folder: Path, note: Callable[[str], None]) -> Iterator[list[Tracker]]:
    """The trackers of train.report_to, closed when the block ends. A resumed run must cut metrics.jsonl back first."""
    trackers = [Tracker(name, config, folder, note) for name in dict.fromkeys(config.train.report_to)]
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.close()


def _tracker_id(folder: Path) -> str:
    """The ID by which a resumed run finds its tracker run; kept in the run folder."""
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

"""Files of a run folder.

out/run/
  config.toml environment.json data_report.json manifest.json    written before the first step
  data_rows.safetensors                                          SHA-256 of each row (checkpoints/row_digests.py)
  changes.json                                                   differences that --allow-change allowed, by step
  metrics.jsonl run-status.json run.lock                         kept current
  step-00000120/                                                 checkpoints
  base/                                                          adapter_mode "original": the merged base
  adapter/ parent/                                               result, and the frozen adapter under it (dpo)
  model/                                                         full fine-tuning: the whole model, not adapter/
  stacked/                                                       both as one PEFT adapter, for use without this package
  trace/                                                         [trace]: parquet files (lowlevel/tracing)
  eval.json eval_items.jsonl forgetting.json                     lowlevel eval, lowlevel compare --probe
  rollouts/                                                      online methods: completions (online/rollouts.py)
  report.html report/                                            lowlevel report: the page, and its charts as PNG
  summary.json loss.png                                          written at the end
  tensorboard/ wandb/ tracker_id.txt                             train.report_to
  failure/                                                       after a loss or gradient that was not finite
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w

from lowlevel.checkpoints.checkpoint import checkpoints, newest_good, newest_verified, step_of
from lowlevel.config.file import config_from_tables, to_tables
from lowlevel.config.schema import RunConfig
from lowlevel.durable import write_json, write_text
from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.model.files import SHOWN, folders_with, read_json_object, read_or_empty

TENSORBOARD, TRACKER_ID = "tensorboard", "tracker_id.txt"  # running/trackers.py
OWN_BASE = "./base"  # model.name in config.toml if the base is in the run folder, which may be moved
INSPECTED = "lowlevel inspect"  # in every page of that command
WRITTEN = (
    *("config.toml", "environment.json", "data_report.json", "manifest.json", "data_rows.safetensors", "changes.json"),
    *("metrics.jsonl", "run-status.json", "memory.json", "summary.json", "loss.png", "report.html", "verify.json"),
    *("compare.json", "forgetting.json", "eval.json", "eval_items.jsonl", TRACKER_ID),
)
OWN_FILES = ("config.toml", "manifest.json", "metrics.jsonl", "data_report.json", "environment.json", "run-status.json")


class RunFolder:
    """Paths of a run folder, and the files that are read or written in more than one place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.whole = path / "model"  # the trained model of full fine-tuning
        self.parent = path / "parent"  # the frozen adapter, PEFT format; absent if the run has none
        self.stacked = path / "stacked"  # parent and trained adapter as one PEFT adapter
        self.base = path / "base"  # adapter_mode "original": the base with the parent adapter merged in
        self.base_record = self.base / "lowlevel_base.json"  # which adapter was merged into it
        self.trace = path / "trace"
        self.rollouts = path / "rollouts"
        self.report = path / "report"
        self.failure = path / "failure"
        self.metrics = path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        """The trained weights: the trained adapter, PEFT format; after full fine-tuning the whole model."""
        return self.whole if self.whole.exists() else self.path / "adapter"

    def final_adapter(self) -> Path:
        """`adapter` of a finished run. Raises ConfigError for others."""
        if not self.adapter.exists():
            raise ConfigError(f"{self.path} has no adapter yet: the run has not finished; --resume continues it")
        return self.adapter

    def newest_adapter(self, warn: Callable[[str], None]) -> Path | None:
        """The final adapter, else the newest good checkpoint, else None. Raises CheckpointError if all are damaged."""
        if self.adapter.exists():
            return self.adapter
        found = newest_verified(self.path, warn)
        return found[0] if found else None

    def words(self, adapter: Path) -> str:
        """What `newest_adapter` found, in words."""
        unfinished = f"{adapter.name}, the newest checkpoint: the run has not finished"
        return "final adapter" if adapter == self.adapter else unfinished

    def holds_run(self) -> bool:
        """Whether a run has written here."""
        return any((self.path / name).exists() for name in OWN_FILES) or bool(checkpoints(self.path))

    def discard(self) -> None:
        """Remove the files that a run wrote, and nothing else."""
        made = (self.whole, self.adapter, self.parent, self.stacked, self.base, self.trace, self.rollouts, self.report)
        others = (self.failure, self.path / TENSORBOARD, self.path / "wandb")
        for path in [*self.path.glob("step-*"), *made, *others]:
            shutil.rmtree(path, ignore_errors=True)
        for path in [*(self.path / name for name in WRITTEN), *self.inspection_pages()]:
            path.unlink(missing_ok=True)

    def inspection_pages(self) -> list[Path]:
        """Pages that `lowlevel inspect --html` wrote here."""
        pages = [path for path in sorted(self.path.glob("*.html")) if path.name != "report.html"]
        return [path for path in pages if INSPECTED in path.read_text(encoding="utf-8", errors="replace")[:40000]]

    def write_config(self, config: RunConfig) -> None:
        """Write config.toml; a base inside this folder gets a relative path."""
        tables = to_tables(config)
        if Path(config.model.name) == self.base:
            tables["model"]["name"] = OWN_BASE
        write_text(self.path / "config.toml", tomli_w.dumps(tables))

    def read_config(self) -> RunConfig:
        """The run's resolved configuration. Raises ConfigError if this is not a run folder."""
        file = self.path / "config.toml"
        try:
            tables = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{self.path} is not a run folder (config.toml is missing){self._what_else()}") from None
        except (ValueError, OSError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from None
        return self.resolved(config_from_tables(tables, str(file)))

    def _what_else(self) -> str:
        """What a folder without config.toml is, for an error."""
        if (self.path.parent / "config.toml").exists():
            return f"; its run folder is {self.path.parent}"
        if (self.path / "adapter_config.json").exists():
            return "; it holds an adapter: set lora.init_from (dpo: or model.adapter) to it"
        runs = folders_with("config.toml", self.path)
        return f"; runs in it: {', '.join(str(path.relative_to(self.path)) for path in runs[:SHOWN])}" if runs else ""

    def resolved(self, config: RunConfig) -> RunConfig:
        """A configuration from this folder's config.toml with the absolute path of a base in this folder."""
        if config.model.name != OWN_BASE or not self.base_record.exists():
            return config
        return config.changed(model={"name": str(self.base)})

    def read_manifest(self) -> dict[str, Any]:
        """manifest.json. Raises CheckpointError if it is missing or unreadable."""
        try:
            return read_json_object(self.path / "manifest.json")
        except FileNotFoundError:
            raise CheckpointError(f"{self.path / 'manifest.json'} cannot be read: it is missing") from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """Logged records, oldest first, without an incomplete last line. Raises CheckpointError for damaged lines."""
        records = [(number, _record(line)) for number, line in self._metrics_lines()]
        for number, record in records:
            if record is None:
                raise CheckpointError(f"{self.metrics}:{number}: not a record; --resume drops it")
        return [record for _, record in records if record is not None]

    def drop_metrics_after(self, step: int) -> None:
        """Remove the lines of steps that a resumed run repeats, and damaged lines."""
        records = [_record(line) for _, line in self._metrics_lines()]
        kept = [json.dumps(record) for record in records if record is not None and record["step"] <= step]
        write_text(self.metrics, "".join(line + "\n" for line in kept))

    def _metrics_lines(self) -> list[tuple[int, bytes]]:
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        return [(number, line) for number, line in enumerate(lines, 1) if line.endswith(b"\n")]

    def read_state(self) -> str | None:
        """The state in run-status.json; None if it cannot be read."""
        return read_or_empty(self.path / "run-status.json").get("state")

    def write_end(self, state: str, exit_code: int, error: str) -> None:
        """Write the status of a run that an error ended, if the run wrote any file."""
        with suppress(OSError):  # a full disk must not hide the error
            if self.holds_run():
                good, _ = newest_good(self.path, lambda line: None) or (None, {})
                self._write_status(state, step_of(good) if good else 0, good, exit_code, error)

    def write_status(self, state: str, step: int, *, exit_code: int | None = None) -> None:
        """Write run-status.json: running or finished, after `step` steps, with the newest checkpoint."""
        self._write_status(state, step, next(iter(checkpoints(self.path)), None), exit_code)

    def _write_status(
        self, state: str, step: int, checkpoint: Path | None, code: int | None, error: str | None = None
    ) -> None:
        name = checkpoint.name if checkpoint else None
        status = {"state": state, "step": step, "checkpoint": name, "exit": code, "error": error}
        write_json(self.path / "run-status.json", status)


def check_reward_run(run_dir: Path) -> None:
    """Raise ConfigError for another kind of run."""
    method = RunFolder(run_dir).read_config().method
    if method != "reward":
        raise ConfigError(f"{run_dir} is a {method} run: rewards need a run of lowlevel reward")


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock a run folder until the process ends. Raises ConfigError if another process holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "run.lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(f"{folder} is in use by pid {file.read().strip() or 'unknown'}") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if it is not one."""
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None

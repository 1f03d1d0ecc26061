"""What lies in a run folder, and the manifest that says which base, adapters and reference belong together.

out/run/
  config.toml environment.json data_report.json manifest.json    written before the first step
  data_rows.safetensors                                          SHA-256 of each row (checkpoints/row_digests.py)
  changes.json                                                   what --allow-change let through, and from which step on
  metrics.jsonl run-status.json run.lock                         kept current
  step-00000120/                                                 checkpoints
  base/                                                          adapter_mode "original": the merged base
  adapter/ parent/                                               result, and the frozen adapter it stands on (dpo)
  stacked/                                                       both as one PEFT adapter, for use without this package
  trace/                                                         [trace]: parquet files (lowlevel/tracing)
  report.html report/                                            lowlevel report: the page, and its charts as PNG
  summary.json loss.png                                          written at the end
  tensorboard/ wandb/ tracker_id.txt                             train.report_to
  failure/                                                       where a loss or gradient was not finite
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from lowlevel import __version__
from lowlevel.batch.order import ORDER_VERSION
from lowlevel.checkpoints.checkpoint import checkpoints, newest_good, newest_verified, step_of
from lowlevel.config.file import config_from_tables, to_tables
from lowlevel.config.schema import RunConfig
from lowlevel.durable import sync, write_json, write_text
from lowlevel.errors import CheckpointError, ConfigError
from lowlevel.model.files import read_json_object

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "tokenizers", "numpy")
TENSORBOARD, TRACKER_ID = "tensorboard", "tracker_id.txt"  # running/trackers.py
OWN_BASE = "./base"  # model.name in config.toml where the base lies in the run folder, which may move
INSPECTED = "lowlevel inspect"  # what every page of that command says of itself
WRITTEN = (
    *("config.toml", "environment.json", "data_report.json", "manifest.json", "data_rows.safetensors", "changes.json"),
    *("metrics.jsonl", "run-status.json", "memory.json", "summary.json", "loss.png", "report.html", "verify.json"),
    *("compare.json", TRACKER_ID),
)
OWN_FILES = ("config.toml", "manifest.json", "metrics.jsonl", "data_report.json", "environment.json", "run-status.json")


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run folder."""

    path: Path

    @property
    def adapter(self) -> Path:
        """The trained adapter, PEFT format."""
        return self.path / "adapter"

    @property
    def parent(self) -> Path:
        """The frozen adapter under it, PEFT format; absent where there is none."""
        return self.path / "parent"

    @property
    def stacked(self) -> Path:
        """Parent and trained adapter as one PEFT adapter."""
        return self.path / "stacked"

    @property
    def base(self) -> Path:
        """adapter_mode "original": the base with the parent adapter merged in."""
        return self.path / "base"

    @property
    def base_record(self) -> Path:
        """Which adapter was merged into that base."""
        return self.base / "lowlevel_base.json"

    @property
    def trace(self) -> Path:
        """What [trace] kept."""
        return self.path / "trace"

    @property
    def report(self) -> Path:
        """The report's charts."""
        return self.path / "report"

    @property
    def failure(self) -> Path:
        """What `lowlevel.running.forensics` found when a loss or gradient was not finite."""
        return self.path / "failure"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    def newest_adapter(self, warn: Callable[[str], None]) -> Path | None:
        """The final adapter, or of an unfinished run its newest checkpoint that verifies; None where there is neither.

        Raises:
            CheckpointError: there are checkpoints alone, and each is damaged; `warn` gets a line for each that is.
        """
        if self.adapter.exists():
            return self.adapter
        found = newest_verified(self.path, warn)
        return found[0] if found else None

    def holds_run(self) -> bool:
        """Whether a run has written here."""
        return any((self.path / name).exists() for name in OWN_FILES) or bool(checkpoints(self.path))

    def discard(self) -> None:
        """Remove what a run wrote into its folder, and nothing else."""
        made = (self.adapter, self.parent, self.stacked, self.base, self.trace, self.report, self.failure)
        for path in [*self.path.glob("step-*"), *made, self.path / TENSORBOARD, self.path / "wandb"]:
            shutil.rmtree(path, ignore_errors=True)
        for path in [*(self.path / name for name in WRITTEN), *self.inspection_pages()]:
            path.unlink(missing_ok=True)

    def inspection_pages(self) -> list[Path]:
        """Pages that `lowlevel inspect --html` left here."""
        pages = [path for path in sorted(self.path.glob("*.html")) if path.name != "report.html"]
        return [path for path in pages if INSPECTED in path.read_text(encoding="utf-8", errors="replace")[:40000]]

    def write_config(self, config: RunConfig) -> None:
        """The resolved configuration; a base inside this folder by its place in it."""
        tables = to_tables(config)
        if Path(config.model.name) == self.base:
            tables["model"]["name"] = OWN_BASE
        write_text(self.path / "config.toml", tomli_w.dumps(tables))

    def read_config(self) -> RunConfig:
        """The configuration that the run resolved.

        Raises:
            ConfigError: not a run folder.
        """
        file = self.path / "config.toml"
        try:
            tables = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{self.path} is not a run folder (config.toml is missing)") from None
        except (ValueError, OSError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from None
        return self.resolved(config_from_tables(tables, str(file)))

    def resolved(self, config: RunConfig) -> RunConfig:
        """A configuration from this folder's config.toml, whose base is found from every working folder."""
        if config.model.name != OWN_BASE or not self.base_record.exists():
            return config
        return config.model_copy(update={"model": config.model.model_copy(update={"name": str(self.base)})})

    def read_manifest(self) -> dict[str, Any]:
        """manifest.json.

        Raises:
            CheckpointError: missing or unreadable.
        """
        try:
            return read_json_object(self.path / "manifest.json")
        except FileNotFoundError:
            raise CheckpointError(f"{self.path / 'manifest.json'} cannot be read: it is missing") from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """Logged records, oldest first; a last line without its end, which a power cut leaves, is not one.

        Raises:
            CheckpointError: a line that is no record.
        """
        records = [(number, _record(line)) for number, line in self._metrics_lines()]
        for number, record in records:
            if record is None:
                raise CheckpointError(f"{self.metrics}:{number}: not a record; --resume drops it")
        return [record for _, record in records if record is not None]

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add a line: all of it or, where the disk refuses, nothing."""
        line = (json.dumps(record) + "\n").encode()
        with open(self.metrics, "ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[file.write(line) :]
            except BaseException as error:
                file.truncate(before)
                if isinstance(error, OSError):
                    error.filename = str(self.metrics)
                raise

    def sync_metrics(self) -> None:
        """Have all lines on disk: a checkpoint must not outlive the lines of the steps before it."""
        if self.metrics.exists():
            sync(self.metrics)

    def drop_metrics_after(self, step: int) -> None:
        """Forget lines of steps that a resumed run will take again, and what a power cut left instead of lines."""
        records = [_record(line) for _, line in self._metrics_lines()]
        kept = [json.dumps(record) for record in records if record is not None and record["step"] <= step]
        write_text(self.metrics, "".join(line + "\n" for line in kept))

    def _metrics_lines(self) -> list[tuple[int, bytes]]:
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        return [(number, line) for number, line in enumerate(lines, 1) if line.endswith(b"\n")]

    def drop_failure(self) -> None:
        """Forget the report of a failure that this start may not meet again."""
        shutil.rmtree(self.failure, ignore_errors=True)

    def read_state(self) -> str | None:
        """The state in run-status.json; None where there is none to be read."""
        try:
            return str(json.loads((self.path / "run-status.json").read_text(encoding="utf-8"))["state"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_end(self, state: str, exit_code: int, error: str) -> None:
        """The status of a run that an error ended, with the newest good checkpoint.

        Nothing where it ended before it had written anything; and what ended it must not be hidden by a disk that has
        no room for the status either.
        """
        with suppress(OSError):
            if self.holds_run():
                found = newest_good(self.path, lambda line: None)
                good = found[0] if found else None
                self._write_status(state, step_of(good) if good else 0, good, exit_code, error)

    def write_status(self, state: str, step: int, *, exit_code: int | None = None) -> None:
        """run-status.json: running or finished, after `step` steps, with the newest checkpoint."""
        self._write_status(state, step, next(iter(checkpoints(self.path)), None), exit_code, None)

    def _write_status(
        self, state: str, step: int, checkpoint: Path | None, exit_code: int | None, error: str | None
    ) -> None:
        name = checkpoint.name if checkpoint else None
        status = {"state": state, "step": step, "checkpoint": name, "exit": exit_code, "error": error}
        write_json(self.path / "run-status.json", status)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; the kernel frees the lock when the process ends, however it ends.

    Raises:
        ConfigError: another process holds it.
    """
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
    """A line's record; None where it is none."""
    try:
        record = json.loads(line)
        return record if isinstance(record["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def environment(device: dict[str, Any]) -> dict[str, Any]:
    """Versions and machine, for environment.json; no paths, names or variables of the user."""
    return {
        "lowlevel": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: version(name) for name in LIBRARIES},
        "order_version": ORDER_VERSION,
        **device,
    }

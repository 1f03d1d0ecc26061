"""What lies in a run folder, and the manifest that says which base, adapters and reference belong together.

out/run/
  config.toml environment.json data_report.json manifest.json    written before the first step
  metrics.jsonl run-status.json run.lock                         kept current
  step-00000120/                                                 checkpoints
  base/                                                          adapter_mode "original": the merged base
  adapter/ parent/                                               result, and the frozen adapter it stands on (dpo)
  stacked/                                                       both as one PEFT adapter, for use without this package
  trace/                                                         [trace]: parquet files (lowlevel/tracing)
  report.html report/                                            lowlevel report: the page, and its charts as PNG
  summary.json loss.png                                          written at the end
  failure/                                                       where a loss or gradient was not finite
"""

from __future__ import annotations

import json
import platform
import shutil
import tomllib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from lowlevel import __version__
from lowlevel.checkpoint import checkpoints, write_json, write_text
from lowlevel.config import RunConfig, config_from_tables, to_tables
from lowlevel.errors import CheckpointError, ConfigError, LowlevelError
from lowlevel.order import ORDER_VERSION

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "tokenizers", "numpy")
# Settings that may differ between a run and its resumption: they do not change what is learned.
FREE_KEYS = (
    "train.output_dir",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "dpo.reference_cache",
    *("trace.every", "trace.steps", "trace.level", "trace.gradients"),
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
    def trace(self) -> Path:
        """What [trace] kept."""
        return self.path / "trace"

    @property
    def report(self) -> Path:
        """The report's charts."""
        return self.path / "report"

    @property
    def failure(self) -> Path:
        """What `lowlevel.forensics` found when a loss or gradient was not finite."""
        return self.path / "failure"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    def holds_run(self) -> bool:
        """Whether a run has written here."""
        return any((self.path / name).exists() for name in OWN_FILES) or bool(checkpoints(self.path))

    def discard(self) -> None:
        """Remove what a run wrote into its folder, and nothing else."""
        made = (self.adapter, self.parent, self.stacked, self.base, self.trace, self.report, self.failure)
        for path in [*self.path.glob("step-*"), *made]:
            shutil.rmtree(path, ignore_errors=True)
        for path in self.path.iterdir():
            if path.is_file() and path.name != "run.lock":
                path.unlink()

    def write_config(self, config: RunConfig) -> None:
        """The resolved configuration."""
        write_text(self.path / "config.toml", tomli_w.dumps(to_tables(config)))

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
        return config_from_tables(tables, str(file))

    def read_manifest(self) -> dict[str, Any]:
        """manifest.json.

        Raises:
            CheckpointError: missing or unreadable.
        """
        try:
            return json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / 'manifest.json'} cannot be read: {error}") from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """Logged records, oldest first; a last line without its end, which a power cut leaves, is not one."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def drop_metrics_after(self, step: int) -> None:
        """Forget lines of steps that a resumed run will take again."""
        kept = [json.dumps(record) for record in self.read_metrics() if record["step"] <= step]
        write_text(self.metrics, "".join(line + "\n" for line in kept))

    def drop_failure(self) -> None:
        """Forget the report of a failure that this start may not meet again."""
        shutil.rmtree(self.failure, ignore_errors=True)

    def write_end(self, state: str, error: LowlevelError) -> None:
        """The status of a run that an error ended; nothing where it ended before it had written anything."""
        if self.holds_run():
            self.write_status(state, exit_code=error.exit_code, error=str(error))

    def write_status(
        self, state: str, step: int | None = None, *, exit_code: int | None = None, error: str | None = None
    ) -> None:
        """run-status.json: running, finished, preempted or failed; without `step`, that of the newest checkpoint."""
        newest = next((path.name for path in checkpoints(self.path)), None)
        if step is None:
            step = int(newest.removeprefix("step-")) if newest else 0
        status = {"state": state, "step": step, "checkpoint": newest, "exit": exit_code, "error": error}
        write_json(self.path / "run-status.json", status)


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


def refuse_changes(config: RunConfig, folder: RunFolder) -> None:
    """A resumed run must be the run that was started.

    Raises:
        ConfigError: naming each setting that differs.
    """
    saved, now = _flatten(to_tables(folder.read_config())), _flatten(to_tables(config))
    changed = [
        key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key) and key not in FREE_KEYS
    ]
    if changed:
        lines = [f"{key}: {saved.get(key)!r} (run) != {now.get(key)!r} (now)" for key in changed]
        raise ConfigError(f"{folder.path}: cannot resume with other settings\n  " + "\n  ".join(lines))


def _flatten(tables: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, value in tables.items():
        flat.update(
            {f"{section}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {section: value}
        )
    return flat

"""What differs between a checkpoint and the run that would continue from it, and which differences are allowed.

The settings, what the run stands on (base, adapters, data, chat template) and the versions that its numbers come from
are compared. config.toml has the settings of the newest start, which may have been killed before its first checkpoint;
changes.json has the step of each change, so those of the checkpoint are known. (Its own manifest does not have them:
there are local paths among the settings.)

torch, transformers, peft, bitsandbytes and tokenizers are compared by major.minor: patch releases are assumed not to
change numbers. Python, numpy, safetensors and lowlevel itself are recorded and may differ; a lowlevel that computes
differently has another `order_version` or checkpoint version.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from lowlevel import __version__
from lowlevel.checkpoints.row_digests import SPLITS, describe_change
from lowlevel.config.file import to_tables
from lowlevel.config.schema import RunConfig
from lowlevel.data.prepare import PreparedData
from lowlevel.durable import write_json
from lowlevel.errors import CheckpointError, ConfigError, DataError
from lowlevel.model.placement import Placement
from lowlevel.running.run_folder import LIBRARIES, RunFolder

CHANGES = "changes.json"
Change = dict[str, Any]
CHANGED = ("step", "key", "from", "to")  # after how many steps which key was changed, and how
# Settings that may differ: they do not change what is learned.
FREE = (
    *("model.embeddings_on_host", "train.offload_activations"),
    *("train.output_dir", "train.logging_steps", "train.save_steps", "train.save_total_limit", "dpo.reference_cache"),
    "train.report_to",
    *("trace.every", "trace.steps", "trace.level", "trace.gradients"),
    *("attention", "versions.lowlevel", "versions.python", "versions.safetensors", "versions.numpy"),
    "versions.accelerate",
)
BY_MINOR = tuple(f"versions.{name}" for name in ("torch", "transformers", "peft", "bitsandbytes", "tokenizers"))
GROUPS = ("base", "versions")  # keys that stand for all below them in --allow-change
# Differences over which the saved state does not fit.
FIXED = {
    "method": "sft and dpo count and log other things",
    "lora.r": "the saved adapter has another shape",
    "lora.target_modules": "the saved adapter is of other layers",
    "train.optim": "the saved optimizer state is of another kind",
    "trainable_parameters": "the saved adapter has another shape",
    "base.dtype": "the saved loss scale belongs to another precision",
}


@dataclass(frozen=True)
class Difference:
    """One key that is not what it was."""

    key: str
    then: Any
    now: Any

    def __str__(self) -> str:
        """`train.learning_rate: 0.0002 (checkpoint) != 0.0001 (now)`."""
        return f"{self.key}: {self.then!r} (checkpoint) != {self.now!r} (now)"


def versions(placement: Placement) -> dict[str, str | None]:
    """What a run computes with; "cuda" and "gpu" are None on a CPU."""
    on_gpu = placement.device.type == "cuda"
    return {
        "lowlevel": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "cuda": torch.version.cuda if on_gpu else None,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
    }


def differences(
    saved: RunConfig,
    payload: Mapping[str, Any],
    config: RunConfig,
    identity: Mapping[str, Any],
    here: Mapping[str, Any],
    later: Sequence[Change] = (),
) -> list[Difference]:
    """All that differs and counts, by key.

    Args:
        saved: the configuration in the run folder.
        payload: the checkpoint's, with "identity" and "versions".
        config, identity, here: configuration, identity and versions now.
        later: changes since the checkpoint, oldest first: `saved` has them, and the checkpoint has not.
    """
    before = {change["key"]: change["from"] for change in reversed(later)}
    settings = {**_flat(to_tables(saved)), **before}
    then = {**settings, **_flat(payload["identity"]), **_flat({"versions": payload.get("versions", {})})}
    now = {**_flat(identity), **_flat({"versions": here}), **_flat(to_tables(config))}
    return [
        Difference(key, then.get(key), now.get(key))
        for key in sorted(then.keys() | now.keys())
        if key not in FREE and not _same(key, then.get(key), now.get(key))
    ]


def check_differences(
    found: Sequence[Difference],
    allowed: Sequence[str],
    step: int,
    folder: RunFolder,
    data: PreparedData,
) -> None:
    """Refuse every difference that was not allowed, now or by an earlier start, all of them in one error.

    Args:
        found: what differs from the checkpoint.
        allowed: keys.
        step: the checkpoint's.
        folder: the run's.
        data: its rows now.

    Raises:
        ConfigError: a key that did not change, a difference that is not allowed, or one that cannot be.
        DataError: nothing but the rows differs: which ones.
        CheckpointError: a changes.json that cannot be read.
    """
    earlier = read_changes(folder)
    changed = ", ".join(difference.key for difference in found) or "nothing did"
    known = [*(difference.key for difference in found), *(change["key"] for change in earlier)]
    for key in allowed:
        if not any(_covers(key, name) for name in known):
            raise ConfigError(f"--allow-change {key}: that has not changed since the checkpoint; what has: {changed}")
    before = [(change["key"], change["to"]) for change in earlier if change["step"] >= step]
    granted = [d for d in found if (d.key, d.now) in before or any(_covers(key, d.key) for key in allowed)]
    refused = [d for d in found if d.key in FIXED or d not in granted]
    rows = {d.key: describe_change(folder.path, d.key, d.then, data) for d in refused if d.key in SPLITS}
    if refused and len(rows) == len(refused):
        raise DataError(f"{folder.path}: cannot resume: {'; '.join(rows.values())}")
    if refused:
        lines = "".join(f"\n  {d}{_reason(d, rows)}" for d in refused)
        raise ConfigError(f"{folder.path}: cannot resume with other settings (--allow-change KEY allows one){lines}")


def _reason(difference: Difference, rows: Mapping[str, str]) -> str:
    if difference.key in FIXED:
        return f"; cannot be allowed: {FIXED[difference.key]}"
    return f"; {rows[difference.key]}" if difference.key in rows else ""


def read_changes(folder: RunFolder, *, since: int = 0) -> list[Change]:
    """The changes that were let through after `since` steps or more, oldest first.

    Raises:
        CheckpointError: a changes.json that cannot be read.
    """
    path = folder.path / CHANGES
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        return [{key: change[key] for key in CHANGED} for change in found if change["step"] >= since]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


@contextmanager
def recorded_changes(folder: RunFolder, step: int, found: Sequence[Difference]) -> Iterator[None]:
    """The block writes settings that differ from those of the checkpoint after `step` steps; changes.json says so.

    What earlier starts let through since that checkpoint is forgotten after the block: it came to nothing, or is among
    `found`. Until then it is needed to tell what the checkpoint's settings were.

    Raises:
        CheckpointError: a changes.json that cannot be read.
    """
    earlier = read_changes(folder)
    new: list[Change] = [{"step": step, "key": d.key, "from": d.then, "to": d.now} for d in found]
    kept = [change for change in earlier if change["step"] < step]
    both = earlier + [change for change in new if change not in earlier]
    if both != earlier:
        write_json(folder.path / CHANGES, both)
    yield
    if kept + new != both:
        write_json(folder.path / CHANGES, kept + new)


def is_written(folder: RunFolder, config: RunConfig, identity: Mapping[str, Any]) -> bool:
    """Whether the folder's config.toml and manifest.json say the same as these.

    Raises:
        ConfigError: no config.toml, or one that cannot be read.
    """
    try:
        return not differences(folder.read_config(), {"identity": folder.read_manifest()}, config, identity, {})
    except CheckpointError:
        return False


def _covers(allowed: str, key: str) -> bool:
    return key == allowed or (allowed in GROUPS and key.startswith(f"{allowed}."))


def _same(key: str, then: Any, now: Any) -> bool:
    if key in BY_MINOR and then and now:
        return str(then).split(".")[:2] == str(now).split(".")[:2]
    return bool(then == now)


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, value in tables.items():
        if isinstance(value, Mapping):
            flat |= {f"{section}.{key}": item for key, item in value.items()}
        else:
            flat[section] = value
    return flat

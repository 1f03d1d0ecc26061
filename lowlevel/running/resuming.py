"""Differences between a checkpoint and the run that continues from it, and which of them are allowed.

Compared are the settings, the identity of the run (base, adapters, data, chat template) and the library versions.
config.toml has the settings of the newest start, which may have ended before its first checkpoint; changes.json has the
step of each change, which gives the settings of the checkpoint. (The checkpoint's manifest does not hold them, because
they contain local paths.)

torch, transformers, peft, bitsandbytes and tokenizers are compared by major.minor: patch releases are assumed not to
change numbers. Python, numpy, safetensors and lowlevel itself are recorded and may differ; a lowlevel that computes
differently has another `order_version` or checkpoint version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lowlevel.checkpoints.row_digests import SPLITS, describe_change
from lowlevel.config.file import to_tables
from lowlevel.config.schema import RunConfig
from lowlevel.data.prepare import PreparedData
from lowlevel.durable import write_json
from lowlevel.errors import CheckpointError, ConfigError, DataError
from lowlevel.running.run_folder import RunFolder

CHANGES = "changes.json"
Change = dict[str, Any]
CHANGED = ("step", "key", "from", "to")  # keys of a change; step: the checkpoint at which it was made
# Settings that may differ because they do not change the trained weights. data.format only says how rows are read:
# the hash of the rows is compared.
FREE = (
    "data.format",
    *("model.embeddings_on_host", "train.offload_activations"),
    *("train.output_dir", "train.logging_steps", "train.save_steps", "train.save_total_limit", "dpo.reference_cache"),
    *("train.report_to", "train.ddp_timeout", "train.shard_base"),
    *("trace.every", "trace.steps", "trace.level", "trace.gradients"),
    "base.prequantised",  # older versions did not write it
    *("attention", "versions.lowlevel", "versions.python", "versions.safetensors", "versions.numpy"),
    "versions.accelerate",
)
BY_MINOR = tuple(f"versions.{name}" for name in ("torch", "transformers", "peft", "bitsandbytes", "tokenizers"))
GROUPS = ("base", "versions")  # in --allow-change these include all keys below them
# Differences with which the saved state does not fit.
FIXED = {
    "method": "each method has its own counters and metrics; set train.output_dir",
    "lora.r": "the saved adapter has another shape",
    "lora.target_modules": "the saved adapter has other layers",
    "lora.loraplus_lr_ratio": "with or without it, the saved optimizer state has another order",
    "train.finetuning_type": "the checkpoint holds an adapter, or else a whole model",
    "train.optim": "the saved optimizer state is of another kind",
    "trainable_parameters": "the saved adapter has another shape",
    "base.dtype": "the saved loss scale belongs to another precision",
}


@dataclass(frozen=True)
class Difference:
    """One key whose value changed."""

    key: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.then!r} (checkpoint) != {self.now!r} (now)"


def differences(
    saved: RunConfig,
    payload: Mapping[str, Any],
    config: RunConfig,
    identity: Mapping[str, Any],
    here: Mapping[str, Any],
    later: Sequence[Change] = (),
) -> list[Difference]:
    """All differences outside FREE, by key.

    Args:
        saved: the configuration in the run folder.
        payload: the checkpoint's, with "identity" and "versions".
        config, identity, here: configuration, identity and versions now.
        later: changes since the checkpoint, oldest first: `saved` has them, the checkpoint does not.
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
    found: Sequence[Difference], allowed: Sequence[str], step: int, folder: RunFolder, data: PreparedData
) -> None:
    """Refuse all differences that neither this start (`allowed` keys) nor an earlier one allows, in one error.

    `found`: differences from the checkpoint after `step` steps. `data`: the run's rows now.

    Raises:
        ConfigError: a key in `allowed` that did not change, or a difference that is not or cannot be allowed.
        DataError: only rows differ; names them.
        CheckpointError: changes.json cannot be read.
    """
    earlier = read_changes(folder)
    changed = ", ".join(difference.key for difference in found) or "nothing"
    known = [*(difference.key for difference in found), *(change["key"] for change in earlier)]
    for key in allowed:
        if not any(_covers(key, name) for name in known):
            raise ConfigError(f"--allow-change {key}: not changed since the checkpoint; changed: {changed}")
    before = [(change["key"], change["to"]) for change in earlier if change["step"] >= step]
    granted = [d for d in found if (d.key, d.now) in before or any(_covers(key, d.key) for key in allowed)]
    refused = [d for d in found if d.key in FIXED or d not in granted]
    rows = {d.key: describe_change(folder.path, d.key, d.then, data) for d in refused if d.key in SPLITS}
    if refused and len(rows) == len(refused):
        raise DataError(f"{folder.path}: cannot resume: {'; '.join(rows.values())}")
    if refused:
        refused = [d for d in refused if d.key == "method"] or refused  # it changes half of the others
        reasons = {key: f"; {row}" for key, row in rows.items()}
        reasons |= {key: f"; cannot be allowed: {reason}" for key, reason in FIXED.items()}
        lines = "".join(f"\n  {d}{reasons.get(d.key, '')}" for d in refused)
        raise ConfigError(f"{folder.path}: cannot resume with other settings (--allow-change KEY allows one){lines}")


def read_changes(folder: RunFolder, *, since: int = 0) -> list[Change]:
    """Changes allowed at checkpoints of `since` steps or more, oldest first. Raises CheckpointError."""
    path = folder.path / CHANGES
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        return [{key: change[key] for key in CHANGED} for change in found if change["step"] >= since]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


@contextmanager
def recorded_changes(folder: RunFolder, step: int, found: Sequence[Difference]) -> Iterator[None]:
    """Record in changes.json that the block writes settings other than those of the checkpoint after `step` steps.

    Changes that earlier starts made since that checkpoint are removed after the block: they had no effect, or are in
    `found`. Until then they are needed to know the checkpoint's settings. Raises CheckpointError.
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
    """Whether config.toml and manifest.json in the folder equal these. Raises ConfigError without a config.toml."""
    try:
        return not differences(folder.read_config(), {"identity": folder.read_manifest()}, config, identity, {})
    except CheckpointError:
        return False


def _covers(allowed: str, key: str) -> bool:
    return allowed in (key, key.rpartition(".")[2]) or (allowed in GROUPS and key.startswith(f"{allowed}."))


def _same(key: str, then: Any, now: Any) -> bool:
    if key in BY_MINOR and then and now:
        return str(then).split(".")[:2] == str(now).split(".")[:2]
    if key == "train.dequantize_once":
        return bool(then) == bool(now)  # runs of before have false; the default gives the same bits
    return bool(then == now)


def _flat(tables: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, value in tables.items():
        if isinstance(value, Mapping):
            flat |= {f"{section}.{key}": item for key, item in value.items()}
        else:
            flat[section] = value
    return flat

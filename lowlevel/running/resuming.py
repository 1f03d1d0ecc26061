"""What differs between a checkpoint and the run that would continue from it, and which differences are allowed.

The settings (config.toml), what the run stands on (base, adapters, data, chat template) and the versions that its
numbers come from are compared. torch, transformers, peft, bitsandbytes and tokenizers are compared by major.minor:
patch releases are assumed not to change numbers. Python, numpy, safetensors and lowlevel itself are recorded and may
differ; a lowlevel that computes differently has another `order_version` or checkpoint version.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from lowlevel import __version__
from lowlevel.checkpoints.row_digests import SPLITS, describe_change
from lowlevel.config import RunConfig
from lowlevel.config_file import to_tables
from lowlevel.data.prepare import PreparedData
from lowlevel.durable import write_json
from lowlevel.errors import CheckpointError, ConfigError, DataError
from lowlevel.model.placement import Placement
from lowlevel.running.run_folder import LIBRARIES, RunFolder

# Settings that may differ: they do not change what is learned.
FREE = (
    *("model.embeddings_on_host", "train.offload_activations"),
    *("train.output_dir", "train.logging_steps", "train.save_steps", "train.save_total_limit", "dpo.reference_cache"),
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
) -> list[Difference]:
    """All that differs and counts, by key.

    Args:
        saved: the configuration in the run folder.
        payload: the checkpoint's, with "identity" and "versions".
        config, identity, here: configuration, identity and versions now.
    """
    then = {**_flat(payload["identity"]), **_flat({"versions": payload.get("versions", {})}), **_flat(to_tables(saved))}
    now = {**_flat(identity), **_flat({"versions": here}), **_flat(to_tables(config))}
    return [
        Difference(key, then.get(key), now.get(key))
        for key in sorted(then.keys() | now.keys())
        if key not in FREE and not _same(key, then.get(key), now.get(key))
    ]


def check_differences(
    found: Sequence[Difference],
    allowed: Sequence[str],
    folder: RunFolder,
    data: PreparedData,
) -> None:
    """Refuse every difference that is not among the `allowed` keys, all of them in one error.

    Raises:
        ConfigError: a key that did not change, a difference that is not allowed, or one that cannot be.
        DataError: nothing but the rows differs: which ones.
    """
    changed = ", ".join(difference.key for difference in found) or "nothing did"
    for key in allowed:
        if not any(_covers(key, difference.key) for difference in found):
            raise ConfigError(f"--allow-change {key}: that has not changed since the checkpoint; what has: {changed}")
    refused = [d for d in found if d.key in FIXED or not any(_covers(key, d.key) for key in allowed)]
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


def record_changes(folder: RunFolder, step: int, found: Sequence[Difference]) -> None:
    """Add to changes.json which differences were let through after `step` steps.

    Changes that were recorded for steps beyond this checkpoint count from this step on: those steps are taken again.

    Raises:
        CheckpointError: a changes.json that cannot be read.
    """
    path = folder.path / "changes.json"
    try:
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        kept = [{**change, "step": min(step, change["step"])} for change in earlier]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    new = [{"step": step, "key": d.key, "from": d.then, "to": d.now} for d in found]
    if kept + new != earlier:
        write_json(path, kept + new)


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

"""Whether two runs are the same one: SHA-256 of every tensor, logged numbers, counters, and what lies about."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from lowlevel.checkpoints.checkpoint import checkpoints, verify
from lowlevel.errors import CheckpointError

MEASURED = ("tokens_per_second", "peak_allocated_gib", "peak_reserved_gib")  # what a clock or an allocator says
TENSOR_FILES = ("adapter_model.safetensors", "optimizer.safetensors")


def fingerprint(run: Path) -> dict[str, Any]:
    """What a finished run amounts to: its tensors, optimizer state, counters and logged lines, by name."""
    newest = checkpoints(run)[0]
    found: dict[str, Any] = {"checkpoint": newest.name}
    for file in [*(newest / name for name in TENSOR_FILES), run / "adapter" / TENSOR_FILES[0]]:
        found |= {f"{file.relative_to(run)} {name}": digest for name, digest in tensor_hashes(file).items()}
    for name in ("stacked", "parent"):
        if (run / name).exists():
            found |= {f"{name} {key}": digest for key, digest in tensor_hashes(run / name / TENSOR_FILES[0]).items()}
    state = verify(newest)["state"]
    for clock in ("seconds", "window_seconds"):
        state.pop(clock)
    found["state"] = state
    found |= {f"logged line {number}": line for number, line in enumerate(logged(run), 1)}
    return found


def tensor_hashes(file: Path) -> dict[str, str]:
    """SHA-256 of each tensor's dtype, shape and bytes."""
    return {
        name: hashlib.sha256(f"{tensor.dtype} {tensor.shape} ".encode() + tensor.tobytes()).hexdigest()
        for name, tensor in load_file(file).items()
    }


def logged(run: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl, without what was measured."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def differences(run: Path, expected: dict[str, Any]) -> list[str]:
    """Names of what is not as expected; a run that cannot be read differs too."""
    try:
        found = fingerprint(run)
    except (OSError, CheckpointError, IndexError, ValueError) as error:
        return [f"no finished run: {type(error).__name__}: {error}"]
    return [key for key in sorted(found.keys() | expected.keys()) if found.get(key) != expected.get(key)]


def litter(run: Path) -> list[str]:
    """What an interrupted save or delete has left, anywhere under the run folder."""
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*"))


def newest_good(run: Path) -> int:
    """Step of the newest checkpoint that verifies; 0 without one."""
    for path in checkpoints(run):
        try:
            return int(verify(path)["step"])
        except CheckpointError:
            continue
    return 0


def damaged(run: Path) -> list[str]:
    """Checkpoints by their names that do not verify."""
    bad = []
    for path in checkpoints(run):
        try:
            verify(path)
        except CheckpointError as error:
            bad.append(str(error))
    return bad


def status(run: Path) -> dict[str, Any]:
    """run-status.json; empty before there is one."""
    file = run / "run-status.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

"""Checkpoints: safetensors and JSON alone, sealed by SHA-256, committed by a rename, verified before they are read.

step-00000120/                      exists only when complete
  adapter_model.safetensors         the trained adapter in PEFT's format
  adapter_config.json
  optimizer.safetensors             "flat::state1", ...
  manifest.json                     {"payload": {...}, "payload_sha256": ...} over every other file
.tmp-step-00000130-<pid>/           a save that did not finish; removed at the next start
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lowlevel.errors import CheckpointError, ConfigError

FORMAT = "lowlevel-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8})")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(safetensors|json)")
_MAX_MANIFEST_BYTES = 16 * 2**20


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


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step: readers see the old or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step, and have it on disk before returning."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one step, and have it on disk before returning; a disk that refuses leaves no part of it."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def save_checkpoint(
    folder: Path, step: int, write_files: Callable[[Path], None], payload: Mapping[str, Any], *, keep: int
) -> Path:
    """Write `step-<step>` under `folder`: all of it or nothing.

    Args:
        folder: the run folder.
        step: applied steps so far.
        write_files: writes the checkpoint's files into the folder it is given.
        payload: JSON values for the manifest (state, identity, versions).
        keep: verified checkpoints to keep, this one included.

    Raises:
        CheckpointError: the disk is full or refuses; nothing of this checkpoint stays, older ones are untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    try:
        temporary.mkdir()
        write_files(temporary)
        files = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
        sealed = {"format": FORMAT, "version": VERSION, "step": step, "files": files, **payload}
        text = json.dumps({"payload": sealed, "payload_sha256": _payload_sha256(sealed)}, indent=1)
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
        for path in temporary.iterdir():
            _sync(path)
        _sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:  # safetensors 0.8 raises its own error where a disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        free, reason = shutil.disk_usage(folder).free, error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{final}: not saved: {reason} ({free:,} bytes free); older checkpoints are good"
        ) from None
    _retire_old(folder, keep)
    return final


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest's payload, after checking its own hash and size and SHA-256 of every file.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    path = checkpoint / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path} is too large to be a manifest")
        document = json.loads(path.read_bytes())
        payload, claimed = document["payload"], document["payload_sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}") from None
    if not isinstance(payload, dict) or _payload_sha256(payload) != claimed:
        raise CheckpointError(f"{path}: its content does not match its own hash")
    if payload.get("format") != FORMAT or payload.get("version") != VERSION:
        raise CheckpointError(f"{path}: format {payload.get('format')} {payload.get('version')} is not known here")
    present = {entry.name for entry in checkpoint.iterdir()} - {MANIFEST}
    if present != set(payload["files"]):
        raise CheckpointError(f"{checkpoint}: files differ: {', '.join(sorted(present ^ set(payload['files'])))}")
    for name, expected in payload["files"].items():
        file = checkpoint / name
        if not _PLAIN_NAME.fullmatch(name) or file.is_symlink():
            raise CheckpointError(f"{checkpoint}: {name!r} is not a plain file name")
        if file.stat().st_size != expected["bytes"] or _describe(file) != expected:
            raise CheckpointError(f"{file}: its content does not match the manifest")
    return payload


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, verified or not."""
    return sorted((p for p in folder.glob("step-*") if _STEP.fullmatch(p.name)), key=lambda p: p.name, reverse=True)


def newest_verified(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, with its payload; None if there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and each is damaged.
    """
    problems = []
    for path in checkpoints(folder):
        try:
            return path, verify(path)
        except CheckpointError as error:
            problems.append(str(error))
            warn(f"skipped a damaged checkpoint: {error}")
    if problems:
        raise CheckpointError(f"{folder}: no usable checkpoint among {len(problems)}:\n  " + "\n  ".join(problems))
    return None


def remove_litter(folder: Path) -> None:
    """Remove what an interrupted save or delete left behind. Call it while holding the run's lock."""
    for path in [*folder.glob(".tmp-*"), *folder.glob(".del-*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _retire_old(folder: Path, keep: int) -> None:
    """Delete older checkpoints once `keep` verified ones exist; damaged ones do not count."""
    kept = 0
    for path in checkpoints(folder):
        try:
            verify(path)
        except CheckpointError:
            continue
        kept += 1
        if kept > keep:
            doomed = folder / f".del-{path.name}"
            os.rename(path, doomed)
            shutil.rmtree(doomed)


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _payload_sha256(payload: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints: safetensors and JSON files with SHA-256 hashes, committed by a rename, verified before reading.

step-00000120/                      exists only if complete
  adapter_model.safetensors         the trained adapter in PEFT's format
  adapter_config.json
  model.safetensors config.json     full fine-tuning: these instead, the whole model in fp32
  optimizer.safetensors             "flat::state1", ...
  reference.safetensors             only with a moving reference: its adapter
  value_head.safetensors            only of ppo: its value head
  manifest.json                     {"payload": {...}, "payload_sha256": ...} with the hashes of all other files
.tmp-step-00000130-<pid>/           an unfinished save; removed at the next start
.old-step-00000120/                 being replaced by a save of the same step (lowlevel/durable.py)
.del-step-00000110/                 being deleted (train.save_total_limit)

A save never reduces the number of good checkpoints.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowlevel.durable import OLD, TEMPORARY, discard, put_back, replaced_folder
from lowlevel.errors import CheckpointError, ConfigError

FORMAT = "lowlevel-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
DELETED = ".del-"
SKIPPED = "skipped a damaged checkpoint: "
_STEP = re.compile(r"step-(\d{8})")
_REPLACED = r"(step-\d{8}|adapter|model|parent|stacked|base|failure)"  # folders of a run that `replaced_folder` writes
_LITTER = re.compile(rf"{re.escape(TEMPORARY)}.+-\d+|({re.escape(OLD)}|{re.escape(DELETED)}){_REPLACED}")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(safetensors|json)")
_MAX_MANIFEST_BYTES = 16 * 2**20
_ROOM = 1.2  # free space for a save, relative to the newest checkpoint


def save_checkpoint(
    folder: Path, step: int, write_files: Callable[[Path], None], payload: Mapping[str, Any], *, keep: int
) -> Path:
    """Write `step-<step>` under `folder`, complete or not at all.

    Args:
        folder: the run folder.
        step: applied steps so far.
        write_files: writes the checkpoint's files into the given folder.
        payload: JSON values for the manifest (state, identity, versions).
        keep: number of verified checkpoints to keep, including this one.

    Raises:
        CheckpointError: the disk is full, has less space than the newest checkpoint takes, or refuses. Older
            checkpoints do not change.
    """
    final, needed = folder / f"step-{step:08d}", 0
    try:
        needed = _room_needed(folder)
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with replaced_folder(final) as temporary:
            write_files(temporary)
            _seal(temporary, {"format": FORMAT, "version": VERSION, "step": step, **payload})
    except OSError as error:
        raise CheckpointError(_not_saved(final, error, needed)) from None
    _retire_old(folder, keep, final)
    return final


def _seal(folder: Path, payload: dict[str, Any]) -> None:
    """Write the manifest with the hashes of a folder's files."""
    sealed = {**payload, "files": {path.name: _describe(path) for path in sorted(folder.iterdir())}}
    text = json.dumps({"payload": sealed, "payload_sha256": _payload_sha256(sealed)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _room_needed(folder: Path) -> int:
    """Bytes that a save may need: 1.2 times the newest checkpoint, or 0 without one."""
    newest = next(iter(checkpoints(folder)), None)
    files = newest.iterdir() if newest and newest.is_dir() else ()
    return math.ceil(_ROOM * sum(path.lstat().st_size for path in files))


def _not_saved(path: Path, error: OSError, needed: int) -> str:
    room = f"{needed:,} bytes needed, " if needed else ""
    with suppress(OSError):
        room += f"{shutil.disk_usage(path.parent).free:,} bytes free"
    return f"{path}: not saved: {error.strerror} ({room}); {last_good(path.parent)}"


def last_good(folder: Path) -> str:
    """The newest good checkpoint, as part of an error message."""
    found = newest_good(folder, lambda line: None)
    return f"the last good checkpoint is {found[0].name}" if found else "there is no checkpoint before it"


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest's payload, after checking its hash, and size and SHA-256 of every file. Raises CheckpointError."""
    for link in filter(Path.is_symlink, (checkpoint, checkpoint / MANIFEST)):
        raise CheckpointError(f"{link} is a symbolic link, which may lead to other files")
    payload = _read_manifest(checkpoint / MANIFEST)
    try:
        step, files = payload["step"], payload["files"]
        if checkpoint.name.startswith("step-") and checkpoint.name != f"step-{step:08d}":
            raise CheckpointError(f"{checkpoint}: holds step {step}")
        present = {entry.name for entry in checkpoint.iterdir()} - {MANIFEST}
        if present != set(files):
            raise CheckpointError(f"{checkpoint}: files differ: {', '.join(sorted(present ^ set(files)))}")
        for name, expected in files.items():
            file = checkpoint / name
            if not _PLAIN_NAME.fullmatch(name) or file.is_symlink():
                raise CheckpointError(f"{checkpoint}: {name!r} is not a plain file name")
            if file.stat().st_size != expected["bytes"] or _describe(file) != expected:
                raise CheckpointError(f"{file}: its content does not match the manifest")
    except OSError as error:
        raise CheckpointError(f"{error.filename or checkpoint} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST}: not a manifest: {type(error).__name__}") from None
    return payload


def _read_manifest(path: Path) -> dict[str, Any]:
    """The payload, after checking its hash and format."""
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
    return payload


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, verified or not."""
    found = (path for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=lambda path: path.name, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Applied steps of a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def saved(folder: Path) -> dict[int, Path]:
    """Checkpoint folders by their steps, newest first, verified or not."""
    return {step_of(path): path for path in checkpoints(folder)}


def newest_good(
    folder: Path, warn: Callable[[str], None], *, before: int | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, with its payload; `warn` gets a line for each newer, damaged one.

    `before`: only checkpoints of fewer applied steps.
    """
    for step, path in saved(folder).items():
        if before is None or step < before:
            try:
                return path, verify(path)
            except CheckpointError as error:
                warn(f"{SKIPPED}{error}")
    return None


def newest_verified(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """`newest_good`; None without checkpoints. Raises CheckpointError if all checkpoints are damaged."""
    problems: list[str] = []

    def note(line: str) -> None:
        problems.append(line.removeprefix(SKIPPED))
        warn(line)

    found = newest_good(folder, note)
    if found is None and problems:
        raise CheckpointError(f"{folder}: no usable checkpoint among {len(problems)}:\n  " + "\n  ".join(problems))
    return found


def checkpoint_at(folder: Path, step: int, flag: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint after `step` applied steps and its payload; `flag` names the option in errors.

    Raises ConfigError with the list of available checkpoints, or CheckpointError for a damaged one.
    """
    found = saved(folder)
    if step not in found:
        known = ", ".join(map(str, sorted(found))) or "none"
        there = f"there are: {known}, and 0 for the start of the run"
        raise ConfigError(f"{flag} {step}: {folder} has no such checkpoint; {there}")
    return found[step], verify(found[step])


def remove_litter(folder: Path) -> None:
    """Restore folders that were being replaced, and remove the rest of interrupted writes and deletes.

    Call it while holding the run's lock. Hidden files with other names stay.
    """
    litter = [path for path in folder.iterdir() if _LITTER.fullmatch(path.name)]
    for path in litter:
        if path.name.startswith(OLD):
            put_back(path)
    for path in litter:
        discard(path)


def remove(path: Path) -> None:
    """Delete a folder of a run; it is renamed first, so that a killed process leaves no part under its name."""
    if path.exists():
        doomed = path.with_name(f"{DELETED}{path.name}")
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def _retire_old(folder: Path, keep: int, new: Path) -> None:
    """Delete older checkpoints if more than `keep` verified ones exist; damaged ones do not count.

    To verify one is to read all of it, so the `new` one, just sealed, counts without that.
    """
    others, kept = [path for path in checkpoints(folder) if path != new], 1
    for path in others if len(others) >= keep else ():
        try:
            verify(path)
        except CheckpointError:
            continue
        kept += 1
        if kept > keep:
            remove(path)


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _payload_sha256(payload: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

"""Checkpoints: safetensors and JSON alone, sealed by SHA-256, committed by a rename, verified before they are read.

step-00000120/                      exists only when complete
  adapter_model.safetensors         the trained adapter in PEFT's format
  adapter_config.json
  optimizer.safetensors             "flat::state1", ...
  manifest.json                     {"payload": {...}, "payload_sha256": ...} over every other file
.tmp-step-00000130-<pid>/           a save that did not finish; removed at the next start
.old-step-00000120/                 the one that a save of the same step takes the place of, between two renames
.del-step-00000110/                 one that retention deletes

A save of a step that has a folder already moves that aside, moves the new one in, and only then deletes the old one. A
process killed between the two moves leaves `.old-step-*` alone, and the next start moves it back (`remove_litter`): at
no point are there fewer good checkpoints than before the save.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
_ROOM = 1.2  # a save needs this many times the size of the newest checkpoint


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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


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
        CheckpointError: the disk is full, too small for a checkpoint like the newest, or refuses; nothing of this
            checkpoint stays, older ones are untouched.
    """
    final = folder / f"step-{step:08d}"
    temporary, old = folder / f".tmp-{final.name}-{os.getpid()}", folder / f".old-{final.name}"
    needed, moved = 0, False
    try:
        needed = _room_needed(folder)
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        temporary.mkdir()
        write_files(temporary)
        _seal(temporary, {"format": FORMAT, "version": VERSION, "step": step, **payload})
        if os.path.lexists(final):
            os.rename(final, old)
        os.rename(temporary, final)
        moved = True
        sync(folder)
    except BaseException as error:
        with suppress(OSError):  # what a disk refuses to move back, the next start does
            if moved:
                os.rename(final, temporary)
            if os.path.lexists(old):
                os.rename(old, final)
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError):  # safetensors 0.8's own error where a disk is full
            raise
        raise CheckpointError(_not_saved(final, error, needed)) from None
    if os.path.lexists(old):
        _remove(old)
    _retire_old(folder, keep)
    return final


def _seal(folder: Path, payload: dict[str, Any]) -> None:
    """Write the manifest over a folder's files, and have all of it on disk."""
    files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    sealed = {**payload, "files": files}
    text = json.dumps({"payload": sealed, "payload_sha256": _payload_sha256(sealed)}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    settle(folder)


def _room_needed(folder: Path) -> int:
    """Bytes that a save may take: a checkpoint like the newest, and a fifth more; 0 where there is none."""
    newest = next(iter(checkpoints(folder)), None)
    files = newest.iterdir() if newest and newest.is_dir() else ()
    return math.ceil(_ROOM * sum(path.lstat().st_size for path in files))


def _not_saved(path: Path, error: Exception, needed: int) -> str:
    reason = error.strerror if isinstance(error, OSError) else error
    room = f"{needed:,} bytes needed, " if needed else ""
    with suppress(OSError):
        room += f"{shutil.disk_usage(path.parent).free:,} bytes free"
    return f"{path}: not saved: {reason} ({room}); {last_good(path.parent)}"


def last_good(folder: Path) -> str:
    """What is left of a run after an error, as half a sentence."""
    for path in checkpoints(folder):
        with suppress(CheckpointError):
            verify(path)
            return f"the last good checkpoint is {path.name}"
    return "there is no checkpoint before it"


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest's payload, after checking its own hash and size and SHA-256 of every file.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    for link in filter(Path.is_symlink, (checkpoint, checkpoint / MANIFEST)):
        raise CheckpointError(f"{link} is a link, not the checkpoint's own")
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
    """The payload, if its hash is the one beside it."""
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
    """Put back what a save was about to replace, and remove what an interrupted save or delete left behind.

    Call it while holding the run's lock.
    """
    for path in folder.glob(".old-step-*"):
        place = folder / path.name.removeprefix(".old-")
        if not os.path.lexists(place):
            os.rename(path, place)
            sync(folder)
    for path in [*folder.glob(".tmp-*"), *folder.glob(".old-step-*"), *folder.glob(".del-*")]:
        _remove(path)


def _remove(path: Path) -> None:
    """Whatever it is: damage can put a file or a link in a folder's place."""
    if path.is_dir() and not path.is_symlink():
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


def settle(folder: Path) -> None:
    """Have a folder's files on disk, with the modes that the umask says: safetensors 0.8 makes them all 0600."""
    mode = folder.stat().st_mode & 0o666  # mkdir went by the umask
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Writing files and folders whole or not at all, and on disk before anything says so.

.tmp-<name>-<pid>     in the making, beside its place; an error removes it, and what a killed process leaves is litter
.old-<name>           a folder that a new one takes the place of, between two renames

A folder cannot be renamed over one that holds something, so the old one is moved aside, the new one moved in, and only
then the old one deleted. A process killed between the two moves leaves `.old-<name>` alone; in a run folder the next
start moves it back (`checkpoints.checkpoint.remove_litter`): there is the old one or the new one, never a part.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"
OLD = ".old-"


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step: readers see the old or the new one, never a part."""
    write_text(path, _as_json(value))


def write_given_json(path: Path, value: Any) -> None:
    """The same for a path that a person gave, see `given_file`."""
    with given_file(path) as target:
        target.write_text(_as_json(value), encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step, and have it on disk before returning."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one step, and have it on disk before returning; a disk that refuses leaves no part of it."""
    with replaced_file(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A path to write a file to, which takes the place of `path` at the end; an error in the block leaves `path` alone.

    It does not end as `path` does: what goes by a file's suffix has to be told the format.

    Raises:
        OSError: the disk refuses.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


@contextmanager
def given_file(path: Path) -> Iterator[Path]:
    """The same for a path that a person gave: a link keeps its place, and a pipe or device is written to.

    Raises:
        OSError: the disk refuses.
    """
    if path.exists() and not path.is_file():  # /dev/stdout
        yield path
        return
    with replaced_file(path.resolve()) as temporary:
        yield temporary


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `target` at the end; whatever is raised leaves `target` as it is.

    Raises:
        OSError: the disk refuses.
    """
    temporary, old, moved = _temporary(target), target.with_name(OLD + target.name), False
    try:
        discard(temporary)  # of a killed process that had this one's number
        temporary.mkdir()
        yield temporary
        settle(temporary)
        if os.path.lexists(target):
            discard(old)
            os.rename(target, old)
        os.rename(temporary, target)
        moved = True
        sync(target.parent)
    except BaseException:
        with suppress(OSError):  # what a disk refuses to move back, the next start does
            if moved:
                os.rename(target, temporary)
            put_back(old)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    with suppress(OSError):  # what it refuses to delete, too
        discard(old)


def put_back(old: Path) -> None:
    """Move a folder that was moved aside back into its place, unless something is there."""
    place = old.with_name(old.name.removeprefix(OLD))
    if os.path.lexists(old) and not os.path.lexists(place):
        os.rename(old, place)
        sync(place.parent)


def discard(path: Path) -> None:
    """Delete whatever is there, if anything: damage can put a file or a link in a folder's place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


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


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")

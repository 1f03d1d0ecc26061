"""Writing files and folders whole or not at all, and on disk before anything says so.

.tmp-<name>-<pid>     in the making, beside its place, and locked by its process; an error removes it
.old-<name>           a folder that a new one takes the place of, between two renames

The kernel frees the lock of a process that is killed. So the next writer of the same name knows what is litter, and
removes it; the number in a name says nothing, for another container or host may have a process of that number. On a
file system without locks such litter stays.

A folder cannot be renamed over one that holds something, so the old one is moved aside, the new one moved in, and only
then the old one deleted. A process killed between the two moves leaves `.old-<name>` alone; in a run folder the next
start moves it back (`checkpoints.checkpoint.remove_litter`): there is the old one or the new one, never a part.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
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
    with _temporary(path, _new_file) as temporary:
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
    old, moved = target.with_name(OLD + target.name), False
    with _temporary(target, _new_folder) as temporary:
        try:
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


def remove_left(folder: Path, name: str | None = None) -> None:
    """Remove the temporaries in a folder whose writers are dead: those of the file or folder `name`, or all."""
    own = re.compile(re.escape(TEMPORARY) + (re.escape(name) if name else ".+") + r"-\d+")
    for left in [path for path in folder.glob(f"{TEMPORARY}*") if own.fullmatch(path.name)]:
        with suppress(OSError):  # a living writer's lock, or a disk that refuses
            _remove_unlocked(left)


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


@contextmanager
def _temporary(path: Path, make: Callable[[Path], int]) -> Iterator[Path]:
    """Something new beside `path`, made and opened by `make`, and locked until the block ends."""
    remove_left(path.parent, path.name)
    for number in count(os.getpid()):
        temporary = path.with_name(f"{TEMPORARY}{path.name}-{number}")
        try:
            descriptor = make(temporary)
        except FileExistsError:  # in containers several processes may have the same number
            continue
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _lies_at(temporary, descriptor):  # else another removed it before it was locked
            break
        os.close(descriptor)
    try:
        yield temporary
    finally:
        os.close(descriptor)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)


def _remove_unlocked(left: Path) -> None:
    descriptor = os.open(left, os.O_RDONLY if left.is_dir() else os.O_RDWR)  # NFS locks what is open for writing alone
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _lies_at(left, descriptor):
            discard(left)
    finally:
        os.close(descriptor)


def _lies_at(path: Path, descriptor: int) -> bool:
    """Whether an open file or folder is still the one of that name."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False

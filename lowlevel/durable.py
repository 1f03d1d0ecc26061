"""Atomic writes of files and folders: complete or not at all, and on disk before the call returns.

.tmp-<name>-<pid>     a file or folder being written, next to its target and locked by its process; errors remove it
.old-<name>           the old folder, between the two renames that replace it

The kernel releases the lock of a killed process, so the next writer of the same name can recognise and remove its
leftovers. The pid in the name proves nothing: another container or host may have the same one. On a file system
without locks leftovers stay.

A folder cannot be renamed over one that is not empty: the old one is moved aside, the new one moved in, and the old
one deleted. If the process is killed between the two renames, only `.old-<name>` remains; the next start of the run
moves it back (`checkpoints.checkpoint.remove_litter`). So a reader finds the old folder or the new one, never a part.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from errno import EIO
from itertools import count
from pathlib import Path
from typing import Any

from lowlevel.errors import ConfigError, LowlevelError, one_line

TEMPORARY = ".tmp-"
OLD = ".old-"


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step: readers see the old or the new one, never a part."""
    write_text(path, _as_json(value))


def write_given_json(path: Path, value: Any) -> None:
    """The same for a path from the user, see `given_file`."""
    write_given(path, _as_json(value))


def write_given(path: Path, text: str) -> None:
    """Write a text file that the user named by an option, see `given_file`."""
    with given_file(path) as target:
        target.write_text(text, encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step; it is on disk when this returns."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one step; it is on disk when this returns. A disk error leaves no partial file."""
    with replaced_file(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def append_line(path: Path, record: Any, *, synced: bool = False) -> None:
    """Append a record as a line of JSON: all of it, or nothing if the disk refuses; if `synced`, it is on disk then."""
    line = (json.dumps(record) + "\n").encode()
    with disk_errors(path), open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[file.write(line) :]
            if synced:
                os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Every error of a disk in the block as an OSError with the name of what is written, `path`.

    A write that fails raises one without a name, and the Rust code of safetensors and tokenizers an error of its own.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and (not error.filename or TEMPORARY in f"{error.filename}{error.filename2}"):
            raise OSError(error.errno or EIO, error.strerror or one_line(error), str(path)) from error
        rust = re.search(r"\(os error (\d+)\)", str(error))
        if rust and not isinstance(error, OSError | LowlevelError):
            raise OSError(int(rust[1]), os.strerror(int(rust[1])), str(path)) from error
        raise


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path; the file written there replaces `path` at the end. An error in the block keeps `path`.

    The temporary path has another suffix: pass the format to writers that derive it from the suffix.
    """
    with disk_errors(path), _temporary(path, folder=False) as temporary:
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
    """The same for a path from the user: a link stays a link, and a pipe or device is written directly."""
    device = path.exists() and not path.is_file()  # /dev/stdout
    with disk_errors(path), nullcontext(path) if device else replaced_file(path.resolve()) as target:
        yield target


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yields a new folder, which replaces `target` at the end. Any exception leaves `target` unchanged."""
    old, moved = target.with_name(OLD + target.name), False
    with disk_errors(target), _temporary(target, folder=True) as temporary:
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
            with suppress(OSError):  # if the disk fails here, the next start moves it back
                if moved:
                    os.rename(target, temporary)
                put_back(old)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    with suppress(OSError):  # or deletes it
        discard(old)


def check_new(out: Path) -> None:
    """Raise ConfigError if there is something at `out`, or if it cannot be written."""
    if os.path.lexists(out):  # also a broken link
        raise ConfigError(f"{out} exists: give a new folder")
    place = next(folder for folder in out.absolute().parents if folder.exists())
    if not os.access(place, os.W_OK):
        raise ConfigError(f"{out} cannot be written: {place} is read-only")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """The same for a folder that must be new: what appears there meanwhile is not replaced (ConfigError)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(out) as temporary:
        yield temporary
        check_new(out)


def put_back(old: Path) -> None:
    """Move a folder that was moved aside back to its place, unless the place is taken."""
    place = old.with_name(old.name.removeprefix(OLD))
    if os.path.lexists(old) and not os.path.lexists(place):
        os.rename(old, place)
        sync(place.parent)


def remove_left(folder: Path, name: str | None = None) -> None:
    """Remove temporary files and folders whose writers have ended: those for `name`, or all."""
    own = re.compile(re.escape(TEMPORARY) + (re.escape(name) if name else ".+") + r"-\d+")
    for left in [path for path in folder.glob(f"{TEMPORARY}*") if own.fullmatch(path.name)]:
        with suppress(OSError):  # a running writer holds the lock, or a disk error
            _remove_unlocked(left)


def discard(path: Path) -> None:
    """Delete a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def settle(folder: Path) -> None:
    """Sync a folder's files to disk, with modes from the umask: safetensors 0.8 gives them all 0600."""
    mode = folder.stat().st_mode & 0o666  # mkdir applied the umask
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Sync a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@contextmanager
def _temporary(path: Path, *, folder: bool) -> Iterator[Path]:
    """A new file or folder next to `path`, locked until the block ends."""
    remove_left(path.parent, path.name)
    for number in count(os.getpid()):
        temporary = path.with_name(f"{TEMPORARY}{path.name}-{number}")
        try:
            if folder:
                temporary.mkdir()
            flags = os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL
            descriptor = os.open(temporary, flags, 0o666)
        except FileExistsError:  # processes of different containers may have the same pid
            continue
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _lies_at(temporary, descriptor):  # otherwise another process removed it before the lock
            break
        os.close(descriptor)
    try:
        yield temporary
    finally:
        os.close(descriptor)


def _remove_unlocked(left: Path) -> None:
    descriptor = os.open(left, os.O_RDONLY if left.is_dir() else os.O_RDWR)  # NFS locks files open for writing
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _lies_at(left, descriptor):
            discard(left)
    finally:
        os.close(descriptor)


def _lies_at(path: Path, descriptor: int) -> bool:
    """Whether `path` still names this open file or folder."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False

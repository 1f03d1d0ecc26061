"""Every change that a process makes to its run folder, counted, so that a fault can come before any one of them.

A change is one of: open (for writing), tensors (safetensors opens), write (the first half is in the file), fsync,
mkdir, rename, replace, unlink, rmdir. Before change n + 1 is also after change n: nothing else touches the folder.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faulting.actions import Action, mark

WRITES = frozenset("wax+")
TEMPORARY = re.compile(r"\.tmp-[^/]+")


@dataclass(frozen=True)
class AtOperation:
    """`action` before each change from `first` (counted from 1) to `last`; other changes go through."""

    first: int
    action: Action
    last: int | None = None  # default: `first` alone

    def install(self, folder: Path) -> None:
        """See Fault."""
        counter = iter(range(1, 10**9))
        last = self.last or self.first

        def act(where: str) -> None:
            if self.first <= next(counter) <= last:
                mark(folder)
                self.action(where)

        watch(folder, act)


@dataclass(frozen=True)
class AtFile:
    """`action` before a change whose description matches `pattern` (a regular expression), the first time or always."""

    pattern: str
    action: Action
    always: bool = False

    def install(self, folder: Path) -> None:
        """See Fault."""
        done: list[str] = []

        def act(where: str) -> None:
            if re.fullmatch(self.pattern, where) and (self.always or not done):
                done.append(where)
                mark(folder)
                self.action(where)

        watch(folder, act)


@dataclass(frozen=True)
class Record:
    """Writes each change as a line of `log`: the dry run by which changes are counted."""

    log: Path

    def install(self, folder: Path) -> None:
        """See Fault."""
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        watch(folder, lambda where: os.write(descriptor, (json.dumps(where) + "\n").encode()))

    def read(self) -> list[str]:
        """What was done, in order, like "rename .tmp-step-00000002 step-00000002"."""
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]


class Halves:
    """A file that is written in halves, with a moment in between."""

    def __init__(self, file: Any, moment: Callable[[], object]) -> None:
        """`file` is an open one."""
        self._file, self._moment = file, moment

    def write(self, data: Any) -> int:
        """The first half reaches the kernel before the moment."""
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._moment()
        return half + int(self._file.write(data[half:]))

    def __getattr__(self, name: str) -> Any:
        """Everything else is the file's own."""
        return getattr(self._file, name)

    def __iter__(self) -> Iterator[Any]:
        """Lines."""
        return iter(self._file)

    def __enter__(self) -> Halves:
        """The file closes at the end."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self._file.close()


def watch(folder: Path, act: Callable[[str], object]) -> None:
    """Call `act` before each change under `folder`, for the rest of this process."""
    inside = _Inside(folder.resolve())
    _watch_opens(inside, act)
    _watch_tensors(inside, act)
    for name in ("mkdir", "unlink", "remove", "rmdir", "rename", "replace"):
        setattr(os, name, _before(getattr(os, name), name, inside, act))
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        if path := inside.name(os.readlink(f"/proc/self/fd/{descriptor}")):
            act(f"fsync {path}")
        fsync(descriptor)

    os.fsync = synced  # type: ignore[assignment]


@dataclass(frozen=True)
class _Inside:
    """Names of paths in the run folder, without process ids."""

    folder: Path

    def name(self, path: Any) -> str | None:
        """None for a path elsewhere."""
        if isinstance(path, int):
            return None
        absolute = os.path.abspath(os.fsdecode(path))
        if absolute != str(self.folder) and not absolute.startswith(f"{self.folder}/"):
            return None
        return TEMPORARY.sub(_without_pid, os.path.relpath(absolute, self.folder))


def _without_pid(match: re.Match[str]) -> str:
    pid = str(os.getpid())
    return match[0].replace(f"-{pid}-", "-").removesuffix(f"-{pid}")


def _before(call: Callable[..., Any], name: str, inside: _Inside, act: Callable[[str], object]) -> Callable[..., Any]:
    def changed(*paths: Any, **keys: Any) -> Any:
        # shutil.rmtree names what it deletes relative to an open folder
        at = keys.get("dir_fd")
        first = paths[0] if at is None else os.path.join(os.readlink(f"/proc/self/fd/{at}"), os.fsdecode(paths[0]))
        if name == "mkdir" and os.path.isdir(first):
            return call(*paths, **keys)  # changes nothing: pathlib asks for folders that may be there
        names = [inside.name(first), *(inside.name(path) for path in paths[1:] if isinstance(path, (str, Path)))]
        if names[0]:
            act(" ".join([name, *(found for found in names if found)]))
        return call(*paths, **keys)

    return changed


def _watch_opens(inside: _Inside, act: Callable[[str], object]) -> None:
    real = io.open

    def opened(file: Any, mode: str = "r", *rest: Any, **keys: Any) -> Any:
        path = inside.name(file) if WRITES & set(mode) else None
        if path is None:
            return real(file, mode, *rest, **keys)
        act(f"open {path}")
        return Halves(real(file, mode, *rest, **keys), lambda: act(f"write {path}"))

    io.open = builtins.open = opened


def _watch_tensors(inside: _Inside, act: Callable[[str], object]) -> None:
    """safetensors writes from Rust: its file is cut to half for the moment in the middle."""
    from safetensors.torch import save_file

    import lowlevel.checkpoints.training_state
    import lowlevel.model.adapters

    def saved(tensors: Any, file: Path, metadata: Any = None) -> None:
        path = inside.name(file)
        if path is None:
            return save_file(tensors, file, metadata)
        act(f"tensors {path}")
        save_file(tensors, file, metadata)
        size, data = os.path.getsize(file), Path(file).read_bytes()
        os.truncate(file, size // 2)
        act(f"tensors write {path}")
        descriptor = os.open(file, os.O_WRONLY)
        os.write(descriptor, data)
        os.close(descriptor)

    lowlevel.model.adapters.save_file = saved  # type: ignore[assignment]
    lowlevel.checkpoints.training_state.save_file = saved  # type: ignore[assignment]

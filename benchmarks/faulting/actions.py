"""What a fault does at its moment: kill, signal, refuse, run out. Each is a frozen value that a process can be sent."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError


def mark(folder: Path) -> None:
    """Note beside the run folder that a fault has come: one that never does would look survived."""
    descriptor = os.open(folder.parent / f".{folder.name}.fault", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, b"1")
    os.close(descriptor)


def came(folder: Path) -> int:
    """How many faults have come."""
    file = folder.parent / f".{folder.name}.fault"
    return file.stat().st_size if file.exists() else 0


class Action(Protocol):
    """Something that happens at one moment of a process."""

    def __call__(self, where: str) -> None:
        """Do it; `where` says what the process was about to do."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL from within: the process ends between two instructions, and nothing of it runs any more."""

    def __call__(self, where: str) -> None:
        """Does not return."""
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()


@dataclass(frozen=True)
class Signal:
    """A signal to itself, as a terminal or a scheduler sends it."""

    number: int

    def __call__(self, where: str) -> None:
        """Python runs the handler before this returns, if it is in the main thread."""
        os.kill(os.getpid(), self.number)


@dataclass(frozen=True)
class Refuse:
    """The operation fails with an errno, by name: "EACCES", "EIO", "EROFS", "ENOSPC"."""

    name: str

    def __call__(self, where: str) -> None:
        """Raise what the operation would raise; safetensors writes from Rust and has an error of its own."""
        number = errno.__dict__[self.name]
        if where.startswith("tensors "):
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
        raise OSError(number, os.strerror(number), where.partition(" ")[2])

    @property
    def text(self) -> str:
        """What a person should read of it."""
        return os.strerror(errno.__dict__[self.name])


@dataclass(frozen=True)
class LimitFileSize:
    """From here on the kernel writes no file beyond `size` bytes: a disk that is full in the middle of a file."""

    size: int

    def __call__(self, where: str) -> None:
        """Python ignores SIGXFSZ, so the write fails with EFBIG."""
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))


@dataclass(frozen=True)
class Hang:
    """Nothing happens any more; the file `sign` is there once it does not."""

    sign: Path

    def __call__(self, where: str) -> None:
        """Does not return."""
        self.sign.touch()
        threading.Event().wait()


@dataclass(frozen=True)
class OutOfMemory:
    """What torch raises where the device has no more memory."""

    def __call__(self, where: str) -> None:
        """Raise it."""
        import torch

        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

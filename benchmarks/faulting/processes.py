"""`lowlevel ARGUMENTS` in a process of its own, with a fault inside.

The processes are forked from a server (multiprocessing's) that has imported everything and run nothing: a whole tiny
training run takes half a second instead of seven, so hundreds of kills take minutes.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parents[2]
# What the server and so every trial has; a GPU would be a different test, and cannot be shared by forked processes.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
    "PYTHONPATH": str(ROOT),
}
# Every start looks at the ends of all other processes, and an end can be read only once: not by two threads at a time.
ONE = threading.Lock()
LIMIT = 120.0  # seconds for one trial; a run takes half of one


class Fault(Protocol):
    """Something that goes wrong in a process. Frozen and picklable: it is sent to the process."""

    def install(self, folder: Path) -> None:
        """Lie in wait; `folder` is the run folder."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (-9: killed by SIGKILL), and what it had printed."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def said(self) -> str:
        """Both streams."""
        return self.out + self.err


class Started:
    """A process that runs `lowlevel`."""

    def __init__(self, arguments: Sequence[str], folder: Path, faults: Sequence[Fault]) -> None:
        """Start it; its output goes to files beside the run folder, so that nothing of it is lost in a kill."""
        start_server()
        self._out, self._err = (folder.parent / f".{folder.name}.{stream}" for stream in ("out", "err"))
        for path in (self._out, self._err):
            path.touch()  # a process may be killed before it has opened them
        context = multiprocessing.get_context("forkserver")
        told = (list(arguments), folder, tuple(faults), self._out, self._err)
        self._process = context.Process(target=_run, args=told, daemon=True)
        self._began = time.perf_counter()
        with ONE:
            self._process.start()

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        with ONE:
            return self._process.exitcode is None

    def wait_for(self, mark: Path) -> None:
        """Wait until a file is there that the process makes.

        Raises:
            RuntimeError: it ended before, or takes too long.
        """
        while not mark.exists():
            if not self.alive or time.perf_counter() - self._began > LIMIT:
                raise RuntimeError(f"{mark.name} was not made: {self.wait().said}")
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def wait(self, seconds: float = LIMIT) -> Ended:
        """Its end; a process older than `seconds` is killed, and that shows in the exit code."""
        while self.alive:
            if time.perf_counter() - self._began > seconds:
                self._process.kill()
            time.sleep(0.003)
        took = time.perf_counter() - self._began
        code = self._process.exitcode
        assert code is not None
        self._process.close()
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in (self._out, self._err))
        return Ended(code, out, err, took)


def lowlevel(arguments: Sequence[str], folder: Path, *faults: Fault) -> Ended:
    """Run `lowlevel ARGUMENTS`, whose run folder is `folder`, to its end."""
    return Started(arguments, folder, faults).wait()


@cache
def start_server() -> None:
    """Start the fork server once, in ENVIRONMENT, and wait for its imports; the environment here stays as it is."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.faulting.preload"])
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        forkserver.ensure_running()
        first = context.Process(target=os.getpid)
        first.start()
        first.join()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(arguments: list[str], folder: Path, faults: tuple[Fault, ...], out: Path, err: Path) -> None:
    """In the new process: the streams, the faults, the command line."""
    for number, path in ((1, out), (2, err)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    from lowlevel.cli import main

    for fault in faults:
        fault.install(folder)
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)

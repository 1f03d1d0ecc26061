"""What a rank does about the others: it learns that one has failed, was killed or hangs, and ends, with one message.

A rank that waits in a collective cannot act: its thread is inside NCCL or gloo. So a second thread looks, twice a
second, into the key-value store that torchrun keeps:

    failure      the first one, as JSON; whoever writes it tells the user, all others end silently
    at/R         number of collectives that rank R has begun
    process/R    host and pid: a process of this host that is gone without a failure was killed
    done/R       rank R has ended by itself

A rank that has waited for `timeout` seconds looks for one that has begun fewer collectives: that one hangs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from lowlevel.errors import CONTINUE

PERIOD = 0.5  # seconds between looks
GRACE = 2.0  # seconds for a waiting thread to come out of its collective by itself
LAST = 20.0  # seconds for which a failed rank waits for rank 0 to record it; torchrun kills 30 s after the first end


class Store(Protocol):
    """A torch.distributed.TCPStore."""

    def set(self, key: str, value: str) -> None:
        """Write a key."""

    def get(self, key: str) -> bytes:
        """Read a key that exists."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Write a key that does not exist yet (`expected` is ""); return what it holds now."""


@dataclass(frozen=True)
class Failure:
    """Why the ranks end: the first cause."""

    rank: int
    teller: int  # the rank that prints it
    code: int
    text: str


class Watch:
    """One rank's view of the others.

    Attributes:
        step: the optimizer step at work, from 1; 0 before the first.
        failure: what the watching thread has found, or None.
        end: called in the watching thread if this rank's own thread cannot end by itself; then the process exits.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.step = self.begun = 0
        self.failure: Failure | None = None
        self.end: Callable[[Failure], None] = lambda failure: None
        self._waiting_since: float | None = None
        self._stopped = threading.Event()
        self._store_lock = threading.Lock()
        self.store.set(f"process/{rank}", f"{socket.gethostname()} {os.getpid()}")
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    @property
    def where(self) -> str:
        """The step for a message; no rank is further than one collective from the others."""
        return f"at step {self.step}" if self.step else "before the first step"

    def begin_waiting(self) -> None:
        """This rank's thread enters a collective."""
        self.begun += 1
        self._waiting_since = time.monotonic()

    def end_waiting(self) -> None:
        """It has come out."""
        self._waiting_since = None

    def claim(self, rank: int, code: int, text: str) -> Failure:
        """Record a failure of `rank` unless one is recorded; return the one that is."""
        own = json.dumps(asdict(Failure(rank, self.rank, code, text)))
        with self._store_lock:
            return Failure(**json.loads(self.store.compare_set("failure", "", own)))

    def found(self, seconds: float = 0.0) -> Failure | None:
        """The recorded failure; waits for one up to `seconds`."""
        until = time.monotonic() + seconds
        while (failure := self._recorded()) is None and time.monotonic() < until:
            time.sleep(0.05)
        return failure

    def reached(self, key: str) -> bool:
        """Whether a rank has written a key."""
        with self._store_lock:
            return self.store.check([key])

    def write(self, key: str) -> None:
        """Write a key for `reached`."""
        with self._store_lock:
            self.store.set(key, "1")

    def gone(self, rank: int) -> bool:
        """Whether a rank's process, if it is on this host, no longer runs."""
        value = self._read(f"process/{rank}")
        host, _, pid = value.partition(" ")
        return bool(value) and host == socket.gethostname() and not _runs(int(pid))

    def close(self, *, failed: bool) -> None:
        """This rank ends. If it failed, it leaves rank 0 time to record that: torchrun ends all after the first end."""
        try:
            self.write(f"done/{self.rank}")
            until = time.monotonic() + LAST
            while failed and self.rank and not self.reached("done/0") and not self.gone(0):
                if time.monotonic() > until:
                    break
                time.sleep(0.05)
        except RuntimeError:  # torchrun has ended
            pass
        self._stopped.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stopped.wait(PERIOD):
            try:
                self._publish()
                self.failure = failure = self._recorded() or self._killed() or self._hung()
            except RuntimeError:  # the store is gone: torchrun was killed, or rank 0 if it keeps the store
                os.kill(os.getpid(), signal.SIGTERM)  # save at the next step boundary, if all are there
                return
            if failure and self._cannot_end(failure):
                self.end(failure)
                with self._store_lock:
                    self.store.set(f"done/{self.rank}", "1")
                os._exit(failure.code)

    def _cannot_end(self, failure: Failure) -> bool:
        """Whether this rank's thread is stuck: in a collective, or because it is the one that hangs."""
        waiting = self._waiting_since
        stuck = waiting is not None and time.monotonic() - waiting > GRACE
        return stuck or self.rank == failure.rank != failure.teller

    def _publish(self) -> None:
        with self._store_lock:
            self.store.set(f"at/{self.rank}", str(self.begun))

    def _recorded(self) -> Failure | None:
        text = self._read("failure")
        return Failure(**json.loads(text)) if text else None

    def _read(self, key: str) -> str:
        with self._store_lock:
            return self.store.get(key).decode() if self.store.check([key]) else ""

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _killed(self) -> Failure | None:
        for rank in self._others():
            if self.gone(rank) and not self.reached(f"done/{rank}"):
                if failure := self._recorded():  # it failed, and told so before it ended
                    return failure
                what = f"rank {rank} was killed {self.where} (signal 9, or no memory left on the host)"
                return self.claim(rank, 1, f"{what}; {CONTINUE}")
        return None

    def _hung(self) -> Failure | None:
        since = self._waiting_since
        if since is None or time.monotonic() - since < self.timeout:
            return None
        behind = [rank for rank in self._others() if int(self._read(f"at/{rank}") or 0) < self.begun]
        rank = (behind or self._others())[0]
        what = f"rank {rank} hangs {self.where}: no answer for {self.timeout:g} s (train.ddp_timeout)"
        failure = self.claim(rank, 1, f"{what}; {CONTINUE}")
        host, _, pid = self._read(f"process/{rank}").partition(" ")
        if failure.teller == self.rank and host == socket.gethostname():
            os.kill(int(pid), signal.SIGKILL)  # torchrun would wait 30 s for it to save
        return failure


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        state: Any = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")

"""What a rank does about the others: it learns that one has failed, was killed or hangs, and ends, with one message.

A rank that waits in a collective cannot act: its thread is inside NCCL or gloo. So a second thread looks, twice a
second, into the key-value store that torchrun keeps:

    failure      the first one, as JSON; whoever writes it tells the user, all others end silently
    at/R         number of collectives that rank R has begun, and its signs of life (heartbeat.py)
    met/R        number of times that rank R has waited for all others outside of a collective
    process/R    host and pid: a process of this host that is gone without a failure was killed
    done/R       rank R has ended by itself

A rank that has waited for `timeout` seconds looks for one that has begun fewer collectives and gave no sign of life for
as long: that one hangs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowlevel.errors import CONTINUE, InterruptedRunError, NonFiniteError, RankError
from lowlevel.heartbeat import Work
from lowlevel.running.endings import Interrupts, code_and_text

if TYPE_CHECKING:
    from torch.distributed import Store

PERIOD = 0.5  # seconds between looks
GRACE = 2.0  # seconds for a waiting thread to come out of its collective by itself


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
    """

    def __init__(self, store: Store, rank: int, size: int, timeouts: Mapping[str, float]) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, sum(timeouts.values())
        self._limit = " + ".join(timeouts)
        self.step = self.begun = self.met = 0
        self.failure: Failure | None = None
        self._record: Callable[[int, str], None] = lambda code, text: None
        self._waiting_since: float | None = None
        self._leaves: bool | None = None  # whether the thread will see a failure by itself; None: unless it waits
        self._seen: dict[int, tuple[str, float]] = {}  # what a rank has published, and since when
        self._stopped = threading.Event()
        self._store_lock = threading.Lock()
        self.store.set(f"process/{rank}", f"{socket.gethostname()} {os.getpid()}")
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def absent(self) -> Failure | None:
        """Wait until all ranks have begun to watch; a failure if one has not within `timeout`."""
        until = time.monotonic() + self.timeout
        while missing := [rank for rank in self._others() if not self.reached(f"process/{rank}")]:
            if time.monotonic() > until:
                return self.claim(missing[0], 1, f"rank {missing[0]} did not start within {self.timeout:g} s")
            time.sleep(0.02)
        return None

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

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Long work that writes nothing, outside of collectives: if another rank fails, this one ends in the middle."""
        self._leaves = False
        try:
            yield
        finally:
            self._leaves = None

    def meet(self) -> None:
        """Wait for all ranks, as long as the others give signs of life. Raises RankError for a failure."""
        self.met, self._leaves = self.met + 1, True
        self.write(f"met/{self.rank}", str(self.met))
        while any(int(self._read(f"met/{rank}") or 0) < self.met for rank in self._others()):
            if self.failure:
                raise self.error(self.failure)
            time.sleep(0.02)
        self._leaves = None

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

    def write(self, key: str, value: str = "1") -> None:
        """Write a key for `reached`."""
        with self._store_lock:
            self.store.set(key, value)

    def gone(self, rank: int) -> bool:
        """Whether a rank's process, if it is on this host, no longer runs."""
        value = self._read(f"process/{rank}")
        host, _, pid = value.partition(" ")
        return bool(value) and host == socket.gethostname() and not _runs(int(pid))

    @contextmanager
    def together(
        self, interrupts: Interrupts, record: Callable[[int, str], None], agreed: Callable[[], int]
    ) -> Iterator[None]:
        """A run of all ranks: an error that leaves the block ends all of them, and one of them tells.

        Args:
            interrupts: handles this process's signals; they wait while an error is passed on.
            record: writes exit code and text of a failure to the run folder, for ranks that cannot do so themselves.
            agreed: the signal that all ranks know of, or 0.
        """
        self._record = record
        try:
            yield
        except GeneratorExit:  # every rank left its loop over the steps
            raise
        except BaseException as error:
            known = isinstance(error, NonFiniteError | RankError)
            known = known or bool(agreed() and isinstance(error, InterruptedRunError))
            with interrupts.deferred():
                raise self._passed_on(error, known) from error
        finally:
            with interrupts.deferred():
                self.close()

    def _passed_on(self, error: BaseException, known: bool) -> BaseException:
        """What to raise for an error: if all ranks know it, rank 0 tells it, else the first rank to fail."""
        code, text = code_and_text(error)
        if known and self.rank:
            self._record_for_first(code, text)
            own = isinstance(error, RankError) and error.rank is not None  # its watch has found the failure
            return error if own else RankError(text, code, told=True)
        if known:
            return error
        if self.rank == 0:
            failure = self.claim(0, code, text)
            return error if failure.rank == 0 else self.error(failure)
        found = self.found(seconds=1.0)  # rank 0 meets the same errors of settings and data
        failure = found or self.claim(self.rank, code, f"rank {self.rank} failed {self.where}: {text}")
        self._record_for_first(failure.code, failure.text)
        return self.error(failure)

    def error(self, failure: Failure) -> RankError:
        """The error to raise for a failure."""
        return RankError(failure.text, failure.code, rank=failure.rank, told=failure.teller != self.rank)

    def _record_for_first(self, code: int, text: str) -> None:
        """Record a failure if rank 0 was killed."""
        if self.rank == 0 or self.gone(0) and not self.reached("done/0"):
            self._record(code, text)

    def _last_words(self, failure: Failure) -> None:
        if failure.teller == self.rank:
            print(f"error: {failure.text}", file=sys.stderr)
        self._record_for_first(failure.code, failure.text)
        sys.stdout.flush()
        sys.stderr.flush()

    def close(self) -> None:
        """This rank ends, but not before rank 0, which has files to write: torchrun ends all after a first failure."""
        try:
            self.write(f"done/{self.rank}")
            until = time.monotonic() + self.timeout
            while self.rank and not self.reached("done/0") and not self.gone(0) and time.monotonic() < until:
                time.sleep(0.05)
        except RuntimeError:  # torchrun has ended
            pass
        self._stopped.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stopped.wait(PERIOD):
            try:
                self.write(f"at/{self.rank}", f"{self.begun} {Work.signs}")
                self.failure = failure = self._recorded() or self._killed() or self._hung()
            except RuntimeError:  # the store is gone: torchrun was killed, or rank 0 if it keeps the store
                os.kill(os.getpid(), signal.SIGTERM)  # save at the next step boundary, if all are there
                return
            if failure and self._cannot_end(failure):
                self._last_words(failure)
                self.write(f"done/{self.rank}")
                if failure.teller != self.rank:
                    time.sleep(PERIOD)  # for the rank that tells: torchrun ends it after this one
                os._exit(failure.code)

    def _cannot_end(self, failure: Failure) -> bool:
        """Whether this rank's thread is stuck: in a collective, or because it is the one that hangs."""
        waiting = self._waiting_since
        stuck = waiting is not None and time.monotonic() - waiting > GRACE
        stuck = stuck if self._leaves is None else not self._leaves
        return stuck or self.rank == failure.rank != failure.teller

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
        since, now = self._waiting_since, time.monotonic()
        if since is None:
            return None
        at = {rank: self._read(f"at/{rank}") or "0" for rank in self._others()}
        for rank, signs in at.items():
            if self._seen.get(rank, ("",))[0] != signs:
                self._seen[rank] = signs, now
        behind = [rank for rank, signs in at.items() if int(signs.split()[0]) < self.begun]
        silent = [rank for rank in behind or at if now - max(since, self._seen[rank][1]) >= self.timeout]
        if not silent:
            return None
        rank = silent[0]
        what = f"rank {rank} hangs {self.where}: no answer for {self.timeout:g} s ({self._limit})"
        failure = self.claim(rank, 1, f"{what}; {CONTINUE}")
        host, _, pid = self._read(f"process/{rank}").partition(" ")
        if failure.teller == self.rank and host == socket.gethostname():
            os.kill(int(pid), signal.SIGKILL)  # torchrun would wait 30 s for it to save
        return failure


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return fields[0] not in ("Z", "X")
    except (OSError, IndexError):
        return False

"""Long work says where it is: a line after each 10 s in which no other progress was printed.

    with heartbeat(print, "sft"):                                     # a command, or a run in Python
        with working("loading the base"): ...
        for row in counted("tokenising", rows, "rows"): ...           # its line has the number done and the time left

Without a heartbeat, `working` and `counted` only run their block. The lines come from a daemon thread, because nothing
else runs while a base is loaded or a layer compiled. It calls nothing but the function that prints, so it disturbs
neither signals nor the capture of a CUDA graph.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from lowlevel.errors import how_many, one_line

INTERVAL, POLL = 9.0, 0.5  # seconds: a line is late by one poll at most, so 10 never pass without one
Clock = Callable[[], float]
Item = TypeVar("Item")


@dataclass(eq=False)
class Work:
    """One piece of work; `done` and `first`, what was done at its start, count up to `total`.

    `signs` counts every beginning and every update of any work: several GPUs tell a slow process from one that hangs.
    """

    signs: ClassVar[int] = 0

    what: str
    started: float = 0.0
    total: int | None = None
    unit: str = ""
    first: int = 0
    done: int = 0

    def __setattr__(self, name: str, value: object) -> None:
        Work.signs += 1
        super().__setattr__(name, value)

    def line(self, now: float) -> str:
        """What is done, how much of it, for how long, and the time left if it is known."""
        seconds = now - self.started
        if not self.total:
            return f"{self.what}: {duration(seconds)}"
        left, here = "", self.done - self.first
        if here > 0:
            left = f", about {duration(seconds / here * (self.total - self.done))} left"
        return f"{self.what}: {self.done:,} of {how_many(self.total, self.unit).strip()}, {duration(seconds)}{left}"


class Heartbeat:
    """The work in progress, the innermost last; `poll` prints its line when one is due."""

    def __init__(self, say: Callable[[str], None], name: str, clock: Clock = time.monotonic) -> None:
        """`name` is what is said of work that has no name of its own."""
        self.say, self.clock, self.paused = say, clock, False
        self.works = [Work(name, clock())]
        self.spoke()

    def spoke(self) -> None:
        """A line was printed: the next one is due INTERVAL seconds from now."""
        self.spoken = self.clock()

    def poll(self) -> None:
        """Print a line if it is due. All work with a total is in it, and the innermost."""
        now, works = self.clock(), list(self.works)
        if not self.paused and now - self.spoken >= INTERVAL:
            shown = [work for work in works if work.total or work is works[-1]]
            self.spoke()
            self.say("; ".join(work.line(now) for work in shown) + (importing() if len(works) == 1 else ""))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Print nothing inside the block: the caller's own work is none of ours."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before
            self.spoke()


_active: ContextVar[Heartbeat | None] = ContextVar("heartbeat", default=None)


@contextmanager
def heartbeat(say: Callable[[str], None], name: str, *, on: bool = True) -> Iterator[Heartbeat]:
    """Print lines by `say` inside the block; not if `on` is False, or if a caller's heartbeat does."""
    outer = _active.get()
    beat, end = Heartbeat(say, name), threading.Event()
    if not on or (outer and not outer.paused):
        yield outer or beat
        return

    def keep_polling() -> None:
        try:
            while not end.wait(POLL):
                beat.poll()
        except (OSError, ValueError):  # the reader has gone; the command itself says what that means
            return

    thread = threading.Thread(target=keep_polling, name="heartbeat", daemon=True)
    _active.set(beat)
    thread.start()
    try:
        yield beat
    finally:  # no reset by token: a generator may be closed in another context
        end.set()
        thread.join(5.0)  # it may be in the middle of a line
        _active.set(outer)


@contextmanager
def working(what: str, total: int | None = None, unit: str = "", *, first: int = 0) -> Iterator[Work]:
    """Name the work of the block; it counts by setting `done` of what it gets, up to `total`, from `first`."""
    beat = _active.get()
    work = Work(what, beat.clock() if beat else 0.0, total, unit, first, first)
    if beat:
        beat.works.append(work)
    try:
        yield work
    finally:
        if beat:
            beat.works.remove(work)


def counted(what: str, items: Collection[Item], unit: str = "") -> Iterator[Item]:
    """The items, counted as they are done."""
    with working(what, len(items), unit) as work:
        for item in items:
            yield item
            work.done += 1


def limited(call: Callable[[], Item], seconds: float, limit: str) -> Item:
    """The result of a call, or its exception, within `seconds`; else a TimeoutError that names the `limit`.

    A thread cannot be stopped: a call over the limit goes on, unread.
    """
    results: list[Item] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)
        except BaseException as error:  # sys.exit() ends the thread, and not the run
            errors.append(RuntimeError(f"{type(error).__name__}: {one_line(error)}"))

    thread = threading.Thread(target=work, daemon=True, name=limit)
    thread.start()
    thread.join(seconds)
    for error in errors:
        raise error
    if not results:
        raise TimeoutError(f"took longer than {seconds:g} s ({limit})")
    return results[0]


def paused() -> AbstractContextManager[None]:
    """A block in which the active heartbeat prints nothing: it waits for a person, or other processes print."""
    beat = _active.get()
    return beat.pause() if beat else nullcontext()


def spoke() -> None:
    """Other progress was printed: no line is due for a while."""
    if beat := _active.get():
        beat.spoke()


def importing() -> str:
    """Which library the main thread is importing, the end of a line; or nothing."""
    stack = traceback.walk_stack(sys._current_frames()[threading.main_thread().ident or 0])
    names = [frame.f_locals["name"].partition(".")[0] for frame, _ in stack if frame.f_code.co_name == "_find_and_load"]
    return next((f", importing {name}" for name in reversed(names) if name != "lowlevel"), "")


def duration(seconds: float) -> str:
    """About two digits: 45 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"

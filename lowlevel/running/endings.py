"""How a run ends: signals, one error with an exit code, and run-status.json.

SIGTERM and SIGINT end a run at once while it is prepared, when the compiler has finished while it compiles, and at the
next step boundary while it trains. A second signal ends the process at once. Imports nothing heavy, so that a command
handles signals from its first line on.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lowlevel.checkpoints.checkpoint import last_good
from lowlevel.errors import CheckpointError, ConfigError, InterruptedRunError, LowlevelError

if TYPE_CHECKING:
    from lowlevel.running.run_folder import RunFolder


class Interrupts:
    """Handles SIGTERM and SIGINT inside a `with` block, and restores the previous handlers afterwards.

    Attributes:
        signum: the first signal received, or 0.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._deferred = self._compiling = self._ended = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {n: signal.signal(n, self.on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended = True
        for number in self._previous:
            handler = signal.getsignal(number)
            while isinstance(owner := getattr(handler, "__self__", None), Interrupts) and owner._ended:
                handler = owner._previous[number]  # runs taken in turns, step by step, end in any order
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block, the first signal is stored, announced, and raises nothing."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Inside the block, the first signal is stored, and raises KeyboardInterrupt at the block's end.

        An exception that passes through torch's compiler can abort the process, with a traceback of C++ functions.
        """
        self._compiling = True
        try:
            with self.deferred():
                yield
        finally:
            self._compiling = False
        if self.signum:
            raise KeyboardInterrupt

    def on_signal(self, signum: int, frame: object) -> None:
        """Raise KeyboardInterrupt for a first signal outside `deferred`, and SystemExit for a second signal. While
        the compiler runs, a second one ends the process here.

        These are not subclasses of Exception, so that libraries do not catch them.
        """
        if self.signum:
            os.write(2, b"\nended at once by a second signal; what was saved before stays\n")
            if self._compiling:
                os._exit(128 + signum)
            raise SystemExit(128 + signum)
        self.signum = signum
        if not self._deferred:
            raise KeyboardInterrupt
        when = b"when the compiler has finished" if self._compiling else b"when this step is saved"
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            os.write(2, b"\nstopping " + when + b"; a second signal ends the process at once\n")

    def error(self) -> InterruptedRunError:
        """The error for a KeyboardInterrupt; one is raised only outside training, so no step is lost."""
        number = signal.Signals(self.signum or signal.SIGINT)
        return InterruptedRunError(f"stopped by {number.name} outside of training: no step is lost", number)


@contextmanager
def one_error(folder: RunFolder, interrupts: Interrupts) -> Iterator[None]:
    """Turn signals and disk errors into one-line errors.

    Raises:
        InterruptedRunError: replaces KeyboardInterrupt.
        CheckpointError: replaces OSError; names the path.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise interrupts.error() from None
    except BrokenPipeError:  # the reader of standard output has ended
        raise
    except OSError as error:
        path, reason = error.filename2 or error.filename or folder.path, error.strerror or str(error)
        lost = f"; {last_good(folder.path)}" if folder.holds_run() else ""
        raise CheckpointError(f"{path}: {reason}{lost}") from error


@contextmanager
def recorded_end(folder: RunFolder) -> Iterator[None]:
    """Record the exception that leaves the block in run-status.json. Enter it while holding the run's lock.

    A command that is refused (exit code 2) before it continues a run does not change that run's status.
    """
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, ConfigError) and folder.read_state() != "running"):
            state = "stopped" if isinstance(error, InterruptedRunError | GeneratorExit) else "failed"
            folder.write_end(state, *code_and_text(error))
        raise


def code_and_text(error: BaseException) -> tuple[int, str]:
    """Exit code and text of what ended a run."""
    if isinstance(error, LowlevelError):
        return error.exit_code, str(error)
    if isinstance(error, SystemExit):
        return int(error.code or 0), "ended at once by a second signal"
    if isinstance(error, GeneratorExit):
        return 0, "the loop over its steps was left; continue with resume"
    if isinstance(error, BrokenPipeError):
        return 130, "standard output was closed"
    return 1, f"{type(error).__name__}: {error}"

"""SIGTERM and SIGINT: at once while a run is prepared, at the next step boundary while it trains, a second one at once.

Nothing heavy is imported here, so that a signal is received from a command's first line on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from lowlevel.errors import InterruptedRunError

RECEIVED = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """Receives signals between `__enter__` and `__exit__`; afterwards they do what they did before.

    Attributes:
        signum: the first signal that came, or 0.
    """

    def __init__(self) -> None:
        """Receives nothing yet."""
        self.signum = 0
        self._deferred = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        """Take the place of the handlers that there are."""
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {number: signal.signal(number, self.on_signal) for number in RECEIVED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Put them back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a first signal is only remembered."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def on_signal(self, signum: int, frame: object) -> None:
        """The handler. What it raises is no Exception, which libraries would take for an error of their own.

        Raises:
            KeyboardInterrupt: the first signal, outside `deferred`.
            SystemExit: a second signal, wherever it finds the program.
        """
        if self.signum:
            raise SystemExit(128 + signum)
        self.signum = signum
        if not self._deferred:
            raise KeyboardInterrupt

    def error(self) -> InterruptedRunError:
        """What a KeyboardInterrupt means for a run: no step was lost, since none was being taken."""
        number = signal.Signals(self.signum or signal.SIGINT)
        return InterruptedRunError(f"stopped by {number.name} outside of training: no step is lost", number)

"""Build the batches of the next step while the device runs the current one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from lowlevel.batch.layout import PackedBatch


class Prefetched:
    """Calls `make(step)` one step ahead, in a thread."""

    def __init__(self, make: Callable[[int], list[PackedBatch]], total_steps: int) -> None:
        self._make, self._total_steps = make, total_steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[list[PackedBatch]]] | None = None

    def __call__(self, step: int) -> list[PackedBatch]:
        """The batches of a step. Raises the errors of `make`."""
        ahead, self._ahead = self._ahead, None
        batches = ahead[1].result() if ahead and ahead[0] == step else self._make(step)
        if step + 1 < self._total_steps:
            self._ahead = step + 1, self._thread.submit(self._make, step + 1)
        return batches

"""A clock for consecutive and nested phases: every second belongs to one phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OTHER = "other"


class PhaseClock:
    """Seconds by phase. Each boundary waits for the device, so that its work counts in the phase that launched it."""

    def __init__(self, device: torch.device) -> None:
        self.phase = OTHER
        self.held = False  # within `throughout`
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._since = self._now()

    def switch(self, phase: str) -> str:
        """End the current phase and begin another; returns the one that ended."""
        if self.held:
            return self.phase
        now, ended = self._now(), self.phase
        self._seconds[ended] = self._seconds.get(ended, 0.0) + now - self._since
        self.phase, self._since = phase, now
        return ended

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase inside the current one, which continues afterwards."""
        before = self.switch(phase)
        try:
            yield
        finally:
            self.switch(before)

    @contextmanager
    def throughout(self, phase: str) -> Iterator[None]:
        """A phase to which all phases inside it belong."""
        with self.during(phase):
            self.held = True
            try:
                yield
            finally:
                self.held = False

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; their sum is the time that passed."""
        self.switch(self.phase)
        taken, self._seconds = self._seconds, {}
        return taken

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

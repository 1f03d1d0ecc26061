"""A clock of phases, and those of a step: functions of the training path, wrapped so that it sees their beginning.

    loop.optimizer_step          other, until the first micro-step
      with_baseline              kto's mismatched completions, with everything inside it
      PackedBatch.to             copy to the device
      Eager.run                  other
        method.loss              log-probabilities and loss
          Policy.reference       reference pass, with everything inside it
          Policy.scored_hidden_states        policy forward
        ...                      backward: all of a micro-step after the loss
      ...                        unscale and clip: after the last micro-step; includes the step's one host sync
      optimizer.step             optimizer

A captured graph is one launch and cannot be divided: only eager and compiled layers can.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from lowlevel import loop
from lowlevel.batch.layout import PackedBatch
from lowlevel.execution import Eager
from lowlevel.methods import Method
from lowlevel.model.policy import Policy

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


LAYOUT = "lay out the rows (CPU)"
COPY = "copy to the device"
BASELINE = "mismatched completions"
REFERENCE = "reference pass"
FORWARD = "policy forward"
LOSS = "log-probabilities, loss"
BACKWARD = "backward"
CLIP = "unscale, clip"
OPTIMIZER = "optimizer"
Call = Callable[[], Any]
# In the order of the table.
PHASES = (LAYOUT, BASELINE, COPY, REFERENCE, FORWARD, LOSS, BACKWARD, CLIP, OPTIMIZER, OTHER)


@contextmanager
def divided(clock: PhaseClock, method: Method, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block, divide steps of `method` and `optimizer` into phases. Their results stay the same."""

    def baseline(call: Call) -> Any:
        with clock.throughout(BASELINE) if method.name == "kto" else nullcontext():
            return call()

    def to_device(call: Call) -> Any:
        with clock.during(COPY):
            return call()

    def micro_step(call: Call) -> Any:
        clock.switch(OTHER)
        sums = call()
        clock.switch(CLIP)
        return sums

    def loss(call: Call) -> Any:
        with clock.during(LOSS):
            sums = call()
        clock.switch(BACKWARD)
        return sums

    @contextmanager
    def reference(call: Call) -> Iterator[None]:
        with clock.during(REFERENCE), call():
            yield

    def forward(call: Call) -> Any:
        with clock.during(REFERENCE if clock.phase == REFERENCE else FORWARD):
            return call()

    def enter(phase: str) -> None:
        clock.switch(phase)

    with ExitStack() as stack:
        for owner, name, around in (
            (loop, "with_baseline", baseline),
            (PackedBatch, "to", to_device),
            (Eager, "run", micro_step),
            (type(method), "loss", loss),
            (Policy, "reference", reference),
            (Policy, "scored_hidden_states", forward),
        ):
            stack.enter_context(_surrounded(owner, name, around))
        # hooks of torch, because a base class of the optimizer may define `step`
        stack.callback(optimizer.register_step_pre_hook(lambda *_: enter(OPTIMIZER)).remove)
        stack.callback(optimizer.register_step_post_hook(lambda *_: enter(OTHER)).remove)
        yield


@contextmanager
def _surrounded(owner: Any, name: str, around: Callable[[Call], Any]) -> Iterator[None]:
    """Within the block, a call of the method goes through `around`, which gets the call as its argument."""
    original = vars(owner)[name]

    @functools.wraps(original)
    def replacement(*arguments: Any, **named: Any) -> Any:
        return around(functools.partial(original, *arguments, **named))

    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)

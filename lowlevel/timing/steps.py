"""The first steps of a run, taken through the loop that trains, each with its seconds; nothing is kept of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import counters

from lowlevel.batch.layout import PackedBatch
from lowlevel.batch.order import DataOrder
from lowlevel.batch.prefetch import Prefetched
from lowlevel.config.schema import RunConfig
from lowlevel.execution import Graphed, WithFallback, signature_of
from lowlevel.loop import train
from lowlevel.losses import LossSums
from lowlevel.methods import Method
from lowlevel.model.policy import Policy
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.train_state import StepResult, TrainState
from lowlevel.timing.clock import PhaseClock
from lowlevel.timing.phases import LAYOUT, divided


@dataclass(frozen=True)
class TimedRun:
    """The parts of a run whose steps are timed."""

    config: RunConfig
    policy: Policy
    method: Method
    optimizer: torch.optim.Optimizer
    order: DataOrder
    examples: Sequence[Any]

    def batches(self, step: int) -> list[PackedBatch]:
        """The micro-batches of step `step`, counted from 0, on the CPU."""
        return self.method.micro_batches([self.examples[i] for i in self.order.step_rows(step)])


@dataclass(frozen=True)
class Step:
    """One step, from the end of the one before it to its own, the device idle at both."""

    number: int  # counted from 1
    phases: dict[str, float]  # seconds; an undivided step is all "other"
    result: StepResult
    set_up: bool  # a batch shape was captured or ran uncaptured, layers were compiled, or the mode fell back
    repeated: bool  # an fp16 overflow had it start anew at half the scale

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.phases.values())

    @property
    def counts(self) -> bool:
        """Whether it took what most steps of a long run take."""
        return not (self.set_up or self.repeated)


class Watched:
    """An Execution, and whether it set something up since it was last asked."""

    def __init__(self, execution: WithFallback) -> None:
        """Nothing yet."""
        self.execution, self.policy, self.method = execution, execution.policy, execution.method
        self._set_up = False

    def run(self, batch: PackedBatch, factor: float, dropout_key: int) -> LossSums:
        """See `lowlevel.execution.Execution`."""
        inner, before = self.execution.execution, self._state()
        known = not isinstance(inner, Graphed) or signature_of(batch) in inner.captured
        try:
            return self.execution.run(batch, factor, dropout_key)
        finally:
            self._set_up |= not known or self._state() != before

    def take(self) -> bool:
        """The answer since the last call."""
        taken, self._set_up = self._set_up, False
        return taken

    def _state(self) -> tuple[str, int]:
        """The mode, and how many graphs torch has compiled in this process."""
        return self.execution.mode, counters["stats"]["unique_graphs"]


class Recorder:
    """What the loop reports to: keeps each step's time, and logs and saves nothing."""

    def __init__(self, clock: PhaseClock, watched: Watched) -> None:
        """`watched` runs the micro-steps."""
        self.clock, self.watched = clock, watched
        self.steps: list[Step] = []
        self._overflows = 0

    def log(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def progress(self, state: TrainState, result: StepResult) -> None:
        """A step has ended."""
        overflows, self._overflows = self._overflows, state.loss_scale.skipped_steps
        repeated = self._overflows > overflows
        self.steps.append(Step(state.step, self.clock.take(), result, self.watched.take(), repeated))

    def save(self, state: TrainState) -> None:
        """Nothing."""

    def stop_requested(self) -> int:
        """Never; a signal ends the command at once."""
        return 0


def take_steps(run: TimedRun, execution: WithFallback, count: int, *, divide: bool = False) -> list[Step]:
    """The first `count` steps of a run, updates included. The adapter's weights are put back afterwards.

    Args:
        run: its parts. The optimizer's state goes on from call to call.
        execution: how micro-steps run.
        count: steps; a run that is shorter goes on with its next epoch.
        divide: into phases, with the rows laid out in the step and not ahead of it; not for the mode "graphed".

    Raises:
        NonFiniteError: as in training.
    """
    policy = run.policy
    clock, watched = PhaseClock(policy.placement.device), Watched(execution)
    recorder = Recorder(clock, watched)

    def laid_out(step: int) -> list[PackedBatch]:
        with clock.during(LAYOUT):
            return run.batches(step)

    with _put_back(policy), divided(clock, run.method, run.optimizer) if divide else nullcontext():
        steps = train(
            watched,
            run.optimizer,
            TrainState(LossScale.for_precision(policy.placement.precision)),
            laid_out if divide else Prefetched(run.batches, count),
            None,
            recorder,
            run.config.train,
            total_steps=count,
            steps_per_epoch=run.order.steps_per_epoch,
        )
        for _ in steps:
            pass
    return recorder.steps


@contextmanager
def _put_back(policy: Policy) -> Iterator[None]:
    """The adapter's weights as they were, afterwards; kept on the host, where they are not in the way of a peak."""
    before = policy.flat.weights.detach().to("cpu", copy=True)
    try:
        yield
    finally:
        with torch.no_grad():
            policy.flat.weights.copy_(before)

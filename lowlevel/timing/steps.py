"""The first steps of a run by the training loop, each with its seconds, and their statistics; weights are restored."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch._dynamo.utils import counters

from lowlevel.batch.layout import PackedBatch
from lowlevel.batch.prefetch import Prefetched
from lowlevel.errors import ConfigError
from lowlevel.execution import Graphed, WithFallback, signature_of
from lowlevel.heartbeat import working
from lowlevel.loop import train
from lowlevel.losses import LossSums
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.train_state import StepResult, TrainState
from lowlevel.running.job import Job
from lowlevel.timing.phases import LAYOUT, PHASES, PhaseClock, divided
from lowlevel.verification.subject import kept_weights


@dataclass(frozen=True)
class Step:
    """One step, from the end of the step before to its own end; the device is idle at both."""

    phases: dict[str, float]  # seconds; an undivided step is all "other"
    result: StepResult
    set_up: bool  # a batch shape was captured or ran uncaptured, layers were compiled, or the execution fell back
    repeated: bool  # an fp16 overflow repeated it at half the scale

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.phases.values())

    @property
    def counts(self) -> bool:
        """Whether its time is typical of a long run."""
        return not (self.set_up or self.repeated)


class Watched:
    """An Execution that records whether it set something up, such as a graph."""

    def __init__(self, execution: WithFallback) -> None:
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
        """Whether it did since the last call."""
        taken, self._set_up = self._set_up, False
        return taken

    def _state(self) -> tuple[str, int]:
        """The mode, and the number of graphs that torch has compiled in this process."""
        return self.execution.mode, counters["stats"]["unique_graphs"]


class Recorder:
    """Observer of the loop: keeps the time of each step; neither logs nor saves."""

    def __init__(self, clock: PhaseClock, watched: Watched) -> None:
        self.clock, self.watched = clock, watched
        self.steps: list[Step] = []
        self._overflows = 0

    def log(self, record: dict[str, Any]) -> None:
        """Not kept."""

    def progress(self, state: TrainState, result: StepResult) -> None:
        """Keep the step that has ended."""
        overflows, self._overflows = self._overflows, state.loss_scale.skipped_steps
        repeated = self._overflows > overflows
        self.steps.append(Step(self.clock.take(), result, self.watched.take(), repeated))

    def save(self, state: TrainState) -> None:
        """Not kept."""

    def stop_requested(self) -> int:
        """Never: a signal ends the command at once."""
        return 0


def take_steps(job: Job, execution: WithFallback, count: int, *, divide: bool = False) -> list[Step]:
    """Take the first `count` steps of a run, with their updates, then restore the adapter's weights.

    A shorter run continues with its next epoch. The optimizer keeps its state between calls. `divide`: divide steps
    into phases, and lay rows out within the step instead of ahead of it; not for "graphed". Raises as in training.
    """
    policy, examples = job.policy, job.inputs.data.train
    clock, watched = PhaseClock(policy.placement.device), Watched(execution)
    recorder = Recorder(clock, watched)

    def batches(step: int) -> list[PackedBatch]:
        return job.method.micro_batches([examples[i] for i in job.order.step_rows(step)])

    def laid_out(step: int) -> list[PackedBatch]:
        with clock.during(LAYOUT):
            return batches(step)

    with kept_weights(policy), divided(clock, job.method, job.optimizer) if divide else nullcontext():
        steps = train(
            watched,
            job.optimizer,
            TrainState(LossScale.for_precision(policy.placement.precision)),
            laid_out if divide else Prefetched(batches, count),
            None,
            recorder,
            job.config.train,
            total_steps=count,
            steps_per_epoch=job.order.steps_per_epoch,
        )
        with working("timing", count, "steps") as work:
            for result in steps:
                work.done = result.step
    return recorder.steps


@dataclass(frozen=True)
class Apart:
    """Steps excluded from the statistics: they set something up, or were repeated."""

    count: int
    median_ms: float | None  # None without steps


@dataclass(frozen=True)
class Whole:
    """Whole steps. Rates are sums over the counted steps, divided once."""

    counted: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    tokens_per_second: float  # without padding; a pair's shared prompt counts once
    supervised_tokens_per_second: float
    padding_share: float  # of the computed positions
    set_up: Apart
    repeated: Apart


def counted_steps(steps: Sequence[Step]) -> list[Step]:
    """The steps with a typical time. Raises ConfigError if there is none."""
    found = [step for step in steps if step.counts]
    if not found:
        met = "met a batch shape for the first time or overflowed"
        raise ConfigError(f"--steps {len(steps)}: each of these steps {met}; give more")
    return found


def whole(steps: Sequence[Step]) -> Whole:
    """Statistics of the steps after the warm-up. Raises ConfigError if none counts."""
    counted = counted_steps(steps)
    times, results = [step.seconds for step in counted], [step.result for step in counted]
    p10, median, p90 = (1e3 * float(value) for value in np.percentile(times, (10, 50, 90)))
    tokens = sum(result.num_tokens for result in results)
    return Whole(
        counted=len(counted),
        median_ms=median,
        p10_ms=p10,
        p90_ms=p90,
        tokens_per_second=tokens / sum(times),
        supervised_tokens_per_second=sum(result.supervised_tokens for result in results) / sum(times),
        padding_share=1.0 - tokens / sum(result.positions for result in results),
        set_up=_apart([step for step in steps if step.set_up]),
        repeated=_apart([step for step in steps if step.repeated and not step.set_up]),
    )


def _apart(steps: Sequence[Step]) -> Apart:
    return Apart(len(steps), 1e3 * statistics.median(step.seconds for step in steps) if steps else None)


def mean_phases(steps: Sequence[Step]) -> dict[str, float]:
    """Mean milliseconds of each phase, in the order of PHASES; their sum is the mean of the whole step."""
    counted = counted_steps(steps)
    known = [name for name in PHASES if any(name in step.phases for step in counted)]
    return {name: 1e3 * sum(step.phases.get(name, 0.0) for step in counted) / len(counted) for name in known}

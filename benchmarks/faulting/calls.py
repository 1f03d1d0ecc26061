"""Faults at the n-th call of a function of the package."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import importlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faulting.actions import Action, mark

MICRO_BATCH = "lowlevel.execution:Eager.run"
EVALUATION = "lowlevel.running.job:evaluate_examples"
PREPARATION = "lowlevel.running.assembly:prepare_data"
LOADING = "lowlevel.running.job:build_run_policy"
SAVE = "lowlevel.running.job:save_state"
STEP = "lowlevel.loop:optimizer_step"


def replace(target: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `make(original)` in the place of "module:function" or "module:Class.method"."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, make(getattr(owner, name)))


@dataclass(frozen=True)
class AtCall:
    """`action` before, or with `after` at the end of, the calls of `target` whose numbers (from 1) are given."""

    target: str
    numbers: tuple[int, ...]
    action: Action
    after: bool = False

    def install(self, folder: Path) -> None:
        """See Fault."""
        counter = iter(range(1, 10**9))

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def called(*arguments: Any, **keys: Any) -> Any:
                due = next(counter) in self.numbers
                if due:
                    mark(folder)
                if due and not self.after:
                    self.action(self.target)
                result = original(*arguments, **keys)
                if due and self.after:
                    self.action(self.target)
                return result

            return called

        replace(self.target, make)


@dataclass(frozen=True)
class Overflows:
    """fp16's loss scale on a CPU: steps from `steps` on overflow above the scale of their limit, and scales grow soon.

    A function of step and scale alone, as real overflows are; a resumed run meets the same ones.
    """

    limits: tuple[tuple[int, float], ...]  # (step from 0, largest scale that does not overflow from there on)
    growth_interval: int = 3

    def install(self, folder: Path) -> None:
        """See Fault."""
        import lowlevel.optim.loss_scale
        from lowlevel.optim.loss_scale import LossScale

        lowlevel.optim.loss_scale.GROWTH_INTERVAL = self.growth_interval
        LossScale.for_precision = classmethod(lambda cls, precision: cls())  # type: ignore[method-assign,assignment]

        def make(step: Callable[..., Any]) -> Callable[..., Any]:
            def taken(execution: Any, optimizer: Any, batches: Any, scale: Any, **keys: Any) -> Any:
                limit = [value for start, value in self.limits if keys["step"] >= start][-1]
                return step(_Overflowing(execution, scale, limit), optimizer, batches, scale, **keys)

            return taken

        replace(STEP, make)


@dataclass(frozen=True)
class _Overflowing:
    execution: Any
    scale: Any
    limit: float

    @property
    def policy(self) -> Any:
        return self.execution.policy

    @property
    def method(self) -> Any:
        return self.execution.method

    def run(self, *arguments: Any, **keys: Any) -> Any:
        sums = self.execution.run(*arguments, **keys)
        if self.scale.scale > self.limit:
            self.policy.flat.grad[0] = float("inf")
        return sums


@dataclass(frozen=True)
class NotFinite:
    """In optimizer step `step` (from 1) a number is not finite: "loss", "gradient" or, after the update, "weights"."""

    what: str
    step: int
    value: float = float("nan")
    micro_batch: int = 1  # from 1

    def install(self, folder: Path) -> None:
        """See Fault."""
        counts = {"step": 0, "micro-batch": 0}

        def make(run: Callable[..., Any]) -> Callable[..., Any]:
            def ran(execution: Any, *arguments: Any, **keys: Any) -> Any:
                sums = run(execution, *arguments, **keys)
                counts["micro-batch"] += 1
                if counts["step"] == self.step and counts["micro-batch"] >= self.micro_batch:
                    if self.what == "loss" and counts["micro-batch"] == self.micro_batch:
                        sums = dataclasses.replace(sums, loss=sums.loss * self.value)
                    if self.what == "gradient":
                        execution.policy.flat.grad[-1] = self.value
                return sums

            return ran

        def count(step: Callable[..., Any]) -> Callable[..., Any]:
            def taken(*arguments: Any, **keys: Any) -> Any:
                counts.update({"step": keys["step"] + 1, "micro-batch": 0})
                result = step(*arguments, **keys)
                if self.what == "weights" and counts["step"] == self.step:
                    arguments[0].policy.flat.weights.data[3] = self.value
                return result

            return taken

        replace(MICRO_BATCH, make)
        replace(STEP, count)


@dataclass(frozen=True)
class Unreadable:
    """Reading files under the run folder whose path ends so fails with EIO: a bad sector."""

    ending: str

    def install(self, folder: Path) -> None:
        """See Fault."""
        real = io.open

        def opened(file: Any, mode: str = "r", *rest: Any, **keys: Any) -> Any:
            if str(file).startswith(str(folder)) and str(file).endswith(self.ending) and "r" in mode:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
            return real(file, mode, *rest, **keys)

        io.open = builtins.open = opened

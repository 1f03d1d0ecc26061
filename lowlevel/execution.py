"""How a micro-step runs: forward, loss and backward of one micro-batch, added into the flat gradient.

    eager      every operation launched from Python: the reference that the others are tested against
    compiled   the same, with each decoder layer compiled (model/layers.py)
    graphed    the compiled micro-step captured in a CUDA graph, once for each batch shape, and replayed

A small model's step is thousands of short kernels, and a CPU takes longer to launch one than a GPU to run it; a graph
is one launch. It replays at fixed addresses, so batch, loss factor and dropout key are copied into its buffers first,
and its sums are copied out. All graphs share one memory pool, since they never run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.errors import ConfigError, RankError
from lowlevel.losses import LossSums
from lowlevel.methods import Method
from lowlevel.model.policy import Policy

MAX_GRAPHS = 32  # the driver needs some 25 MB for a graph of 5,000 kernels, which no allocator counts
MODES = ("eager", "compiled", "graphed")
Signature = tuple[object, ...]
Result = TypeVar("Result")


class ExecutionFailedError(Exception):
    """The mode failed and it, or a simpler one, is ready: repeat the step from a gradient of zero."""


class Execution(Protocol):
    """Runs micro-steps of a policy with a method's loss."""

    @property
    def policy(self) -> Policy:
        """Its flat gradient receives the sums' gradients."""

    @property
    def method(self) -> Method:
        """Its loss is computed."""

    def run(self, batch: PackedBatch, factor: float, dropout_key: int) -> LossSums:
        """Add the gradient of `factor` times the summed loss to the flat gradient; return the sums, detached.

        `dropout_key` is the hash of seed and step. A captured graph overwrites the sums' `examples` and `tokens` when
        it replays.
        """


@dataclass(frozen=True)
class Eager:
    """Launches every operation from Python; also runs compiled layers."""

    policy: Policy
    method: Method

    def run(self, batch: PackedBatch, factor: float, dropout_key: int) -> LossSums:
        """See Execution."""
        return micro_step(self.policy, self.method, batch, factor, dropout_key)


def micro_step(
    policy: Policy, method: Method, batch: PackedBatch, factor: float | Tensor, dropout_key: int | Tensor
) -> LossSums:
    """Forward pass, loss and backward pass of one micro-batch; see Execution."""
    policy.dropout.set_micro_batch(batch.dropout_keys, dropout_key)
    sums = method.loss(policy, batch)
    if sums.loss.requires_grad:  # not that of kto's mismatched completions
        (sums.loss * factor).backward()
    return replace(sums, loss=sums.loss.detach())


@dataclass
class Captured:
    """One graph with its buffers."""

    graph: torch.cuda.CUDAGraph
    batch: PackedBatch
    factor: Tensor
    dropout_key: Tensor
    sums: LossSums  # as the last replay left it
    scalars: Tensor  # loss and metrics of `sums` in one tensor


class Graphed:
    """Captures each batch shape when it first occurs, and replays it from then on."""

    def __init__(self, policy: Policy, method: Method) -> None:
        """Captures nothing yet."""
        self.policy, self.method = policy, method
        self.captured: dict[Signature, Captured] = {}
        self._ready: set[frozenset[str]] = set()
        self._failed: set[Signature] = set()  # shapes whose capture failed once
        self._plain: set[Signature] = set()  # of these, the ones to be run uncaptured once before the next try
        self._pool: Any = None
        self._stream = torch.cuda.Stream()

    def run(self, batch: PackedBatch, factor: float, dropout_key: int) -> LossSums:
        """See Execution.

        Raises ExecutionFailedError: this shape cannot be captured yet; the repeated step runs it without capture.
        """
        signature = signature_of(batch)
        kind = frozenset(batch.tensors())  # batches of other tensors run other operations
        if kind not in self._ready or signature in self._plain:
            self._ready.add(kind)
            self._plain.discard(signature)
            return self._warm_up(batch, factor, dropout_key)
        captured = self.captured.pop(signature, None)
        if captured is None:
            if len(self.captured) >= MAX_GRAPHS:
                torch.cuda.synchronize()  # the oldest may still be running
                del self.captured[next(iter(self.captured))]
            captured = self._try_capture(batch, signature)
        self.captured[signature] = captured  # the last one is the one used last
        return self._replay(captured, batch, factor, dropout_key)

    def _warm_up(self, batch: PackedBatch, factor: float, dropout_key: int) -> LossSums:
        """Run the first micro-step without capture: compilers and libraries initialise themselves in it."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return micro_step(self.policy, self.method, batch, factor, dropout_key)
        finally:  # a failed step's kernels must have ended before the next attempt zeroes the gradient
            current.wait_stream(self._stream)

    def _try_capture(self, batch: PackedBatch, signature: Signature) -> Captured:
        """Capture; after the first failure of a shape, let it run once without capture before the next try, because a
        compiler that must recompile for this shape cannot do so within a capture.
        """
        try:
            return self._capture(batch)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if signature in self._failed:
                raise
            self._failed.add(signature)
            self._plain.add(signature)
            raise ExecutionFailedError("the shape runs uncaptured once") from error

    def _capture(self, batch: PackedBatch) -> Captured:
        device = batch.input_ids.device
        own = batch.with_tensors({name: tensor.clone() for name, tensor in batch.tensors().items()})
        factor = torch.zeros((), device=device)
        key = torch.zeros((), dtype=torch.int32, device=device)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        if not self.captured:
            torch.cuda.empty_cache()  # else the warm-up's blocks stay cached in addition to the pool
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            sums = micro_step(self.policy, self.method, own, factor, key)
            scalars = torch.stack([value.float() for value in sums.named().values()])
        self._pool = self._pool or graph.pool()
        return Captured(graph, own, factor, key, sums, scalars)

    def _replay(self, captured: Captured, batch: PackedBatch, factor: float, dropout_key: int) -> LossSums:
        own = captured.batch.tensors()
        new = batch.tensors()
        torch._foreach_copy_(list(own.values()), [new[name] for name in own], non_blocking=True)
        captured.factor.fill_(factor)
        captured.dropout_key.fill_(dropout_key)
        captured.graph.replay()
        loss, *metrics = captured.scalars.clone().unbind()
        return replace(captured.sums, loss=loss, metrics=dict(zip(captured.sums.metrics, metrics, strict=True)))


def signature_of(batch: PackedBatch) -> Signature:
    """What a captured graph depends on: the shape of every tensor, and the longest span."""
    return (batch.longest, *((name, tuple(tensor.shape)) for name, tensor in batch.tensors().items()))


class WithFallback:
    """Runs in one mode; if it cannot compile or capture, prints one line and continues in the next simpler mode."""

    falls_back = True  # a sharded base does not: FSDP2 must not be used after a failure in a layer

    def __init__(self, policy: Policy, method: Method, mode: str, note: Callable[[str], None]) -> None:
        """`note` prints the line."""
        self.policy, self.method, self.note = policy, method, note
        self.use(mode)

    def use(self, mode: str) -> None:
        """Switch to a mode of MODES."""
        if self.policy.placement.device.type == "cuda":
            torch.cuda.synchronize()  # the graphs that are dropped here may still be running
        self.mode = mode
        self.policy.layers.use(compiled=mode != "eager")
        self.execution: Execution = (
            Graphed(self.policy, self.method) if mode == "graphed" else Eager(self.policy, self.method)
        )

    def run(self, batch: PackedBatch, factor: float, dropout_key: int) -> LossSums:
        """See Execution.

        Raises ExecutionFailedError: the mode failed; it, or a simpler one, is ready to repeat the step.
        """
        return self._attempt(lambda: self.execution.run(batch, factor, dropout_key))

    def until_it_runs(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which runs layers outside of a step (a rehearsal, an evaluation); it is called again
        after each fallback, so it must be able to start over.
        """
        while True:
            try:
                return self._attempt(work)
            except ExecutionFailedError:
                continue

    def _attempt(self, work: Callable[[], Result]) -> Result:
        try:
            return work()
        except (torch.cuda.OutOfMemoryError, ExecutionFailedError):
            raise
        except Exception as error:
            if self.mode == "eager" or isinstance(error, RankError):
                raise
            simpler = MODES[MODES.index(self.mode) - 1]
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if not self.falls_back:
                raise ConfigError(f'{self.mode} failed ({reason[:200]}): set train.execution = "{simpler}"') from error
            self.note(f"execution: {self.mode} failed ({reason[:200]}); continuing {simpler}")
            self.use(simpler)
            raise ExecutionFailedError(simpler) from error

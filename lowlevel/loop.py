"""The training loop: one optimizer step is one function; everything that happens less often is below it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.config.schema import TrainConfig
from lowlevel.errors import EVAL_LOSS, EVAL_REWARD, NonFiniteError, how_many
from lowlevel.execution import Eager, Execution, ExecutionFailedError
from lowlevel.hashing import key32
from lowlevel.heartbeat import counted
from lowlevel.losses import LossSums
from lowlevel.losses.sums import by_label
from lowlevel.methods import Method
from lowlevel.model.policy import Policy
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.optimizer import learning_rate, set_learning_rate
from lowlevel.optim.train_state import StepResult, TrainState, Window, on_host, totals
from lowlevel.ranks import ALONE, Ranks, Share
from lowlevel.tracing import Tracer


def optimizer_step(
    execution: Execution,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    loss_scale: LossScale,
    *,
    seed: int,
    step: int,
    max_grad_norm: float,
    ranks: Ranks = ALONE,
    tracer: Tracer | None = None,
    details: bool = False,
) -> StepResult:
    """Forward and backward passes over the micro-batches, then one update. An fp16 overflow repeats the step at half
    the scale.

    `ranks` share the micro-batches. `tracer` is given for a step that is to be traced; `details` keeps what was
    computed of each example and token.

    Raises:
        NonFiniteError: the loss is NaN or infinite, or the gradient is at every scale tried; nothing was updated.
    """
    method, flat, grad = execution.method, execution.policy.flat, execution.policy.flat.grad
    batches = with_baseline(execution, batches, ranks)
    count, dropout_key = sum(map(method.count, batches)), key32(seed, step)
    share, details = ranks.deal(batches), details or tracer is not None
    attempts: list[dict[str, float]] = []
    while True:
        scale = loss_scale.scale
        sums = accumulate(execution, share, scale / count, dropout_key, details=details)
        summed, more = ranks.sum_step(flat, totals(sums), share)  # the one all-reduce
        sums = ranks.gather(share, batches, sums) if details else sums
        if tracer is not None:
            tracer.take(step, batches, sums, scale, dropout_key)
        norm = torch.linalg.vector_norm(grad) / scale
        grad.mul_((max_grad_norm / (norm + 1e-6)).clamp(max=1.0) / scale)  # clip and unscale at once
        with ranks.waiting():
            metrics, grad_norm, heard = on_host(summed, count, norm, more)  # the one host sync
        ranks.hear(heard)
        metrics |= batches[0].facts
        attempts.append({"loss_scale": scale, "loss": metrics["loss"], "grad_norm": grad_norm})
        if math.isfinite(metrics["loss"]) and loss_scale.accepts(grad_norm):
            break
        if not math.isfinite(metrics["loss"]) or loss_scale.exhausted:
            raise _not_finite(attempts, loss_scale, step, seed, batches, ranks.failing)
    optimizer.step()
    return StepResult(step + 1, metrics, grad_norm, optimizer.param_groups[0]["lr"], count, tuple(batches), sums)


def with_baseline(execution: Execution, batches: Sequence[PackedBatch], ranks: Ranks = ALONE) -> Sequence[PackedBatch]:
    """kto: the micro-batches with the mean log-ratio of all their mismatched completions. Others: as they are.

    A sum on the device: a repeated attempt of the step uses the same number, and the host does not wait for it.
    """
    others = [other for batch in batches for other in batch.mismatched]
    if not others:
        return batches
    share = ranks.deal(others)
    sums = accumulate(execution, share, 0.0, 0, details=False)
    total = torch.zeros_like(sums[0].loss) if share.idle else torch.stack([one.loss for one in sums]).sum()
    kl = ranks.sum_(total) / sum(len(other.data_rows) for other in others)
    return [replace(batch, kl=kl) for batch in batches]


def accumulate(
    execution: Execution, share: Share, factor: float, dropout_key: int, *, details: bool
) -> tuple[LossSums, ...]:
    """The gradient of `factor` times the summed loss of the micro-batches, in the flat gradient; the sums of each."""
    policy, last = execution.policy, max(1, len(share.numbers))  # the results of others do not count
    while True:
        policy.flat.grad.zero_()
        try:  # moved one by one: the GPU starts on the first
            waiting = counted("this step", share.batches, "micro-batches")
            moved = ((batch.to(policy.placement.device), factor * (i < last)) for i, batch in enumerate(waiting))
            return tuple(execution.run(*one, dropout_key).kept(details) for one in moved)[:last]
        except ExecutionFailedError:  # it, or a simpler mode, is ready to start over
            continue


def _not_finite(
    attempts: list[dict[str, float]],
    loss_scale: LossScale,
    step: int,
    seed: int,
    batches: Sequence[PackedBatch],
    failing: Sequence[int],
) -> NonFiniteError:
    last, rows = attempts[-1], [row for batch in batches for row in batch.data_rows]
    quantity = "gradient norm" if math.isfinite(last["loss"]) else "loss"
    value = last["loss" if quantity == "loss" else "grad_norm"]
    halvings = loss_scale.skips_in_a_row if loss_scale.enabled and quantity != "loss" else 0
    tried = f" after {how_many(halvings, 'halvings')} of the loss scale" if halvings else ""
    on = f" on rank {failing[0]}" if failing else ""
    message = f"step {step + 1}: {quantity} is {value}{on}{tried}; nothing was updated; data rows {rows}"
    return NonFiniteError(
        message, quantity=quantity, value=value, step=step, batches=batches, seed=seed, attempts=attempts
    )


def check_evaluation(scores: Mapping[str, float], step: int, batches: Sequence[PackedBatch]) -> None:
    """Refuse the scores of `evaluate_examples` after `step` updates if their loss is NaN or infinite.

    Raises:
        NonFiniteError: with the held-out `batches`.
    """
    loss = scores[EVAL_LOSS]
    if not math.isfinite(loss):
        message = (
            f"step {step}: {EVAL_LOSS} is {loss} over {sum(len(batch.data_rows) for batch in batches)} held-out rows"
        )
        raise NonFiniteError(message, quantity=EVAL_LOSS, value=loss, step=step - 1, batches=batches)


class Observer(Protocol):
    """Receives what the loop reports."""

    def log(self, record: dict[str, Any]) -> None:
        """A logged step, or an evaluation."""

    def progress(self, state: TrainState, result: StepResult) -> None:
        """A step, logged or not."""

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of this step boundary."""

    def stop_requested(self) -> int:
        """The signal that asked to stop, or 0; the same on every rank."""


def train(
    execution: Execution,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    step_batches: Callable[[int], list[PackedBatch]],
    evaluate: Callable[[], dict[str, float]] | None,
    observer: Observer,
    config: TrainConfig,
    *,
    total_steps: int,
    steps_per_epoch: int,
    ranks: Ranks = ALONE,
    tracer: Tracer | None = None,
    details: bool = False,
) -> Iterator[StepResult]:
    """Take the steps from `state.step` to `total_steps`, or until a signal or early stopping; yield each one's result.

    `state` is kept current. A step is yielded after its update and log line, before its checkpoint.
    """
    while state.step < total_steps and not state.stopped_early:
        started = time.perf_counter()
        ranks.begin(state.step + 1)
        set_learning_rate(optimizer, learning_rate(state.step, total_steps, config))
        result = optimizer_step(
            execution,
            optimizer,
            step_batches(state.step),
            state.loss_scale,
            seed=config.seed,
            step=state.step,
            max_grad_norm=config.max_grad_norm,
            ranks=ranks,
            tracer=tracer if tracer is not None and tracer.wants(state.step) else None,
            details=details,
        )
        state.record(result, time.perf_counter() - started)
        execution.policy.move_reference(state.step)
        observer.progress(state, result)
        last = state.step == total_steps
        if state.step % config.logging_steps == 0 or last:
            observer.log(state.close_window(result.learning_rate, state.step / steps_per_epoch))
        if evaluate and (last or (config.eval_steps and state.step % config.eval_steps == 0)):
            scores = evaluate()
            observer.log({"step": state.step, "epoch": state.step / steps_per_epoch, **scores})
            judged = scores[EVAL_LOSS] if EVAL_LOSS in scores else -scores[EVAL_REWARD]
            state.judge(judged, config.early_stopping_patience)
        yield result
        due = last or state.stopped_early or (config.save_steps and state.step % config.save_steps == 0)
        if due or observer.stop_requested():
            observer.save(state)
            if observer.stop_requested():  # it may have come during the save
                return


@torch.no_grad()
def evaluate_examples(
    policy: Policy, method: Method, batches: Sequence[PackedBatch], *, prefix: str, ranks: Ranks = ALONE
) -> dict[str, float]:
    """Means over held-out micro-batches, dropout off, and scores of the method's own; names begin with `prefix`."""
    window, seen = Window(), list[dict[str, Tensor]]()
    batches = with_baseline(Eager(policy, method), batches, ranks)
    policy.dropout.disable()
    share, device = ranks.deal(batches), policy.placement.device
    waiting = counted("evaluating", share.batches, "micro-batches")
    own = [replace(method.loss(policy, batch.to(device)), tokens={}) for batch in waiting]
    for batch, sums in zip(batches, ranks.gather(share, batches, own), strict=True):
        named = sums.named()
        window.add(dict(zip(named, torch.stack(list(named.values())).tolist(), strict=True)), method.count(batch))
        values = {"lengths": batch.lengths, **sums.examples}
        seen.append({name: value[: len(batch.data_rows)] for name, value in values.items()})
    more = method.held_out_scores({name: torch.cat([one[name] for one in seen]) for name in seen[0]})
    return {f"{prefix}{name}": value for name, value in (by_label(window.means()) | more).items()}

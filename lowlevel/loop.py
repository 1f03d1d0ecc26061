"""The training loop: one optimizer step is one function, and everything that happens once in a while is below it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from lowlevel.batch.layout import PackedBatch
from lowlevel.config.schema import TrainConfig
from lowlevel.errors import EVAL_LOSS, NonFiniteError
from lowlevel.execution import Execution, ExecutionFailedError, Kept, Method
from lowlevel.model.policy import Policy
from lowlevel.optim.loss_scale import MAX_SKIPS_IN_A_ROW, LossScale
from lowlevel.optim.optimizer import learning_rate, set_learning_rate
from lowlevel.optim.train_state import StepResult, TrainState, Window
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
    tracer: Tracer | None = None,
) -> StepResult:
    """Forward and backward over the micro-batches, then one update. An fp16 overflow repeats the step at half the
    scale. `tracer` is given for a step that is to be traced.

    Raises:
        NonFiniteError: the loss is not finite, or the gradient is not at any scale tried; nothing was updated.
    """
    policy, method = execution.policy, execution.method
    grad, count = policy.flat.grad, sum(method.count(batch) for batch in batches)
    attempts: list[dict[str, float]] = []
    not_finite = partial(_not_finite, step=step, seed=seed, batches=batches, attempts=attempts)
    while True:
        grad.zero_()
        kept: list[Kept] | None = None if tracer is None else []
        try:
            moved = (batch.to(policy.placement.device) for batch in batches)  # one by one: the GPU starts on the first
            sums = [execution.run(batch, loss_scale.scale / count, seed, step, kept) for batch in moved]
        except ExecutionFailedError:
            continue
        if tracer is not None and kept is not None:
            tracer.take(step, batches, kept, loss_scale.scale, seed)
        norm = torch.linalg.vector_norm(grad) / loss_scale.scale
        grad.mul_((max_grad_norm / (norm + 1e-6)).clamp(max=1.0) / loss_scale.scale)  # clip and unscale at once
        totals = {name: torch.stack([one[name] for one in sums]).sum() for name in sums[0]}
        *means, grad_norm = torch.stack(
            [*(total / count for total in totals.values()), norm]
        ).tolist()  # the one host sync
        metrics = dict(zip(totals, means, strict=True))
        attempts.append({"loss_scale": loss_scale.scale, "loss": metrics["loss"], "grad_norm": grad_norm})
        if not math.isfinite(metrics["loss"]):
            raise not_finite("loss", metrics["loss"])
        loss_scale.update(math.isfinite(grad_norm))
        if math.isfinite(grad_norm):
            break
        if not loss_scale.enabled or loss_scale.skips_in_a_row > MAX_SKIPS_IN_A_ROW:
            tried = f" after {loss_scale.skips_in_a_row} halvings of the loss scale" if loss_scale.enabled else ""
            raise not_finite("gradient norm", grad_norm, tried)
    optimizer.step()
    return StepResult(
        metrics=metrics,
        grad_norm=grad_norm,
        count=count,
        examples=sum(len(batch.data_rows) for batch in batches),
        num_tokens=sum(batch.num_tokens for batch in batches),
        supervised_tokens=sum(batch.num_scored for batch in batches),
        positions=sum(batch.input_ids.numel() for batch in batches),
    )


def _not_finite(
    quantity: str, value: float, tried: str = "", *, step: int, batches: Sequence[PackedBatch], **details: Any
) -> NonFiniteError:
    rows = [row for batch in batches for row in batch.data_rows]
    message = f"step {step + 1}: {quantity} is {value}{tried}; nothing was updated; data rows {rows}"
    return NonFiniteError(message, quantity=quantity, value=value, step=step, batches=batches, **details)


def check_evaluation(scores: Mapping[str, float], step: int, batches: Sequence[PackedBatch]) -> None:
    """Refuse the scores of `evaluate_examples` after `step` updates where their loss is no number.

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
    """What the loop reports to, once in a while."""

    def log(self, record: dict[str, Any]) -> None:
        """A logged step."""

    def progress(self, state: TrainState, result: StepResult) -> None:
        """A step, logged or not."""

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of this step boundary."""

    def stop_requested(self) -> int:
        """The signal that asked to stop, or 0."""


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
    tracer: Tracer | None = None,
) -> None:
    """Run steps `state.step` to `total_steps`, or until a signal or early stopping. `state` is kept current."""
    while state.step < total_steps and not state.stopped_early:
        started = time.perf_counter()
        rate = learning_rate(state.step, total_steps, config)
        set_learning_rate(optimizer, rate)
        result = optimizer_step(
            execution,
            optimizer,
            step_batches(state.step),
            state.loss_scale,
            seed=config.seed,
            step=state.step,
            max_grad_norm=config.max_grad_norm,
            tracer=tracer if tracer is not None and tracer.wants(state.step) else None,
        )
        state.record(result, time.perf_counter() - started)
        observer.progress(state, result)
        last = state.step == total_steps
        if state.step % config.logging_steps == 0 or last:
            observer.log(state.close_window(rate, state.step / steps_per_epoch))
        if evaluate and (last or (config.eval_steps and state.step % config.eval_steps == 0)):
            scores = evaluate()
            observer.log({"step": state.step, "epoch": state.step / steps_per_epoch, **scores})
            state.judge(scores[EVAL_LOSS], config.early_stopping_patience)
        due = last or state.stopped_early or (config.save_steps and state.step % config.save_steps == 0)
        if due or observer.stop_requested():
            observer.save(state)
            if observer.stop_requested():  # it may have come during the save
                return


@torch.no_grad()
def evaluate_examples(
    policy: Policy, method: Method, batches: Sequence[PackedBatch], *, prefix: str
) -> dict[str, float]:
    """Means over held-out micro-batches, dropout off, each name with `prefix` before it."""
    window = Window()
    policy.dropout.disable()
    for batch in batches:
        moved = batch.to(policy.placement.device)
        sums = method.loss(policy, moved)
        named = {"loss": sums.loss, **sums.metrics}
        window.add(dict(zip(named, torch.stack(list(named.values())).tolist(), strict=True)), method.count(batch))
    return {f"{prefix}{name}": value for name, value in window.means().items()}

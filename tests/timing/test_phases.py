"""The phases: what is called in each, and that a divided step computes what any step computes, bit for bit."""

import math
import time
from contextlib import contextmanager

import helpers
import pytest
import torch

from lowlevel import loop
from lowlevel.batch.layout import PackedBatch
from lowlevel.config.offline import DPOConfig, SFTConfig
from lowlevel.config.schema import TrainConfig
from lowlevel.execution import Eager
from lowlevel.loop import optimizer_step
from lowlevel.methods.dpo import DPO
from lowlevel.methods.sft import SFT
from lowlevel.model import policy as policy_module
from lowlevel.model.policy import Policy
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.optimizer import build_optimizer
from lowlevel.timing import phases
from lowlevel.timing.phases import OTHER, PhaseClock, divided

CPU = torch.device("cpu")
METHODS = {
    "sft": (SFT(SFTConfig(), 2, 48, True), helpers.ragged_examples()),
    "dpo": (DPO(DPOConfig(disable_dropout=False), 2, 64, True), helpers.ragged_pairs()),
    "kto": (helpers.kto(2, packing=True, disable_dropout=False), helpers.labelled_examples(6)),
    "dpo, a row each": (DPO(DPOConfig(), 2, 64, False), helpers.ragged_pairs()),
}
OPTIMIZERS = ("paged_adamw_32bit", "paged_adamw_8bit", "adamw")


def numbers(result):
    return result.step, result.metrics, result.grad_norm, result.learning_rate, result.count, result.rows


def take(policy, method, examples, optimizer, *, scale=1.0):
    """A real step with its update."""
    loss_scale = LossScale(scale=scale, enabled=scale != 1.0)
    batches = method.micro_batches(examples)
    execution = Eager(policy, method)
    return optimizer_step(execution, optimizer, batches, loss_scale, seed=1, step=3, max_grad_norm=0.1)


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_divided_step_is_the_same_step_bit_for_bit(tiny_base, name, checkpointing, optim):
    method, examples = METHODS[name]
    found = []
    for divide in (False, True):
        policy = helpers.make_policy(tiny_base, dropout=0.3, checkpointing=checkpointing)
        optimizer = build_optimizer(policy.flat.weights, TrainConfig(optim=optim, learning_rate=1e-2))
        clock = PhaseClock(CPU)
        if divide:
            with divided(clock, method, optimizer):
                result = take(policy, method, examples, optimizer)
            absent = {phases.LAYOUT} | ({phases.REFERENCE} if name == "sft" else set())
            expected = set(phases.PHASES) - absent - ({phases.BASELINE} if name != "kto" else set())
            assert set(clock.take()) == expected and clock.phase == OTHER
        else:
            result = take(policy, method, examples, optimizer)
        found.append((result, policy.flat.grad.clone(), policy.flat.weights.detach().clone()))
    (plain, grad, weights), (timed, timed_grad, timed_weights) = found
    assert numbers(timed) == numbers(plain) and plain.grad_norm > 0.1
    assert torch.equal(timed_grad, grad) and torch.equal(timed_weights, weights)


class Slow:
    """A clock that stands still but for what a test makes slow, by a number of seconds that tells it apart."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.patch = 0.0, patch
        patch.setattr(time, "perf_counter", lambda: self.now)

    def make(self, owner: object, name: str, seconds: float) -> None:
        """Each call of a function takes so long."""
        original = vars(owner)[name]

        def slow(*arguments, **named):
            self.now += seconds
            return original(*arguments, **named)

        self.patch.setattr(owner, name, slow)

    def optimizer(self, policy: Policy, seconds: float) -> torch.optim.Optimizer:
        """One that takes so long, and does nothing."""
        slow = self

        class Idle(torch.optim.SGD):
            def step(self, closure=None):
                slow.now += seconds

        return Idle([policy.flat.weights], lr=0.0)


@pytest.mark.parametrize("name", METHODS)
def test_each_function_counts_in_its_phase(tiny_base, monkeypatch, name):
    method, examples = METHODS[name]
    policy = helpers.make_policy(tiny_base)
    batches, slow = len(method.micro_batches(examples)), Slow(monkeypatch)
    optimizer = slow.optimizer(policy, 10_000_000)
    slow.make(PackedBatch, "to", 1)
    slow.make(Policy, "scored_hidden_states", 10)
    slow.make(policy_module, "token_scores", 100)
    slow.make(torch.Tensor, "backward", 1_000)
    slow.make(LossScale, "accepts", 10_000)  # after the norm and the host sync
    slow.make(PackedBatch, "sequence_sums", 100_000)
    slow.make(loop, "StepResult", 1_000_000)
    clock = PhaseClock(CPU)
    with divided(clock, method, optimizer):
        take(policy, method, examples, optimizer)
    taken, references = clock.take(), name != "sft"
    mismatched = sum(len(batch.mismatched) for batch in method.micro_batches(examples))
    assert (mismatched > 0) == (name == "kto")
    assert batches > 1
    assert taken == {
        **({phases.BASELINE: (1 + 2 * (10 + 100) + 100_000) * mismatched} if mismatched else {}),
        phases.COPY: 1 * batches,
        **({phases.REFERENCE: (10 + 100) * batches} if references else {}),
        phases.FORWARD: 10 * batches,
        phases.LOSS: (100 + 2 * 100_000) * batches,
        phases.BACKWARD: 1_000 * batches,
        phases.CLIP: 10_000,
        phases.OPTIMIZER: 10_000_000,
        OTHER: 1_000_000,
    }
    assert sum(taken.values()) == slow.now


def test_a_step_that_overflows_is_divided_too(tiny_base, monkeypatch):
    """It starts anew at half the scale; its update comes once."""
    method, examples = METHODS["sft"]
    policy = helpers.make_policy(tiny_base)
    calls, whole = [], SFT.loss

    def overflow_at_first(self, policy, batch):
        calls.append(batch)
        sums = whole(self, policy, batch)
        if len(calls) == 1:
            sums.loss.register_hook(lambda grad: grad * math.inf)
        return sums

    monkeypatch.setattr(SFT, "loss", overflow_at_first)
    slow, clock = Slow(monkeypatch), PhaseClock(CPU)
    optimizer = slow.optimizer(policy, 1)
    slow.make(torch.Tensor, "backward", 10)
    with divided(clock, method, optimizer):
        result = take(policy, method, examples, optimizer, scale=2.0)
    attempts = 2 * len(method.micro_batches(examples))
    assert len(calls) == attempts and math.isfinite(result.grad_norm)
    taken = clock.take()
    assert (taken[phases.OPTIMIZER], taken[phases.BACKWARD], sum(taken.values())) == (1, 10 * attempts, slow.now)


def methods_now():
    return [
        vars(owner)[name]
        for owner, name in ((PackedBatch, "to"), (Eager, "run"), (SFT, "loss"), (DPO, "loss"), (Policy, "reference"),
                            (Policy, "scored_hidden_states"))
    ]  # fmt: skip


def test_everything_is_put_back_whatever_happens(tiny_base):
    method, _ = METHODS["dpo"]
    policy = helpers.make_policy(tiny_base)
    optimizer = build_optimizer(policy.flat.weights, TrainConfig())
    before, clock = methods_now(), PhaseClock(CPU)
    with pytest.raises(RuntimeError), divided(clock, method, optimizer):
        assert sum(one is not other for one, other in zip(methods_now(), before, strict=True)) == 5
        raise RuntimeError
    assert methods_now() == before
    clock.take()
    optimizer.step()
    assert clock.phase == OTHER and phases.OPTIMIZER not in clock.take()


def test_the_reference_is_still_the_reference(tiny_base):
    """Its pass has no adapter, no dropout and no gradient, and what was active before is active again."""
    method, examples = METHODS["dpo"]
    policy = helpers.make_policy(tiny_base, dropout=0.3)
    batch = method.micro_batches(examples)[0]
    policy.dropout.set_micro_batch(batch.dropout_keys, 7)
    seen = []

    @contextmanager
    def looked():
        with policy.reference():
            seen.append((policy.dropout.token_keys, torch.is_grad_enabled(), policy.lora_layers[0].active_adapters))
            yield

    optimizer = build_optimizer(policy.flat.weights, TrainConfig())
    with divided(PhaseClock(CPU), method, optimizer), looked():
        pass
    assert seen == [(None, False, [])] and policy.dropout.token_keys is not None
    assert policy.lora_layers[0].active_adapters == ["trained"]

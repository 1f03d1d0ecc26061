"""Loss scaling: GradScaler's rule, a step that is repeated and not lost, and numbers that stop a run."""

import math
from dataclasses import dataclass, field

import helpers
import pytest
import torch

from lowlevel.config.schema import TrainConfig
from lowlevel.errors import NonFiniteError
from lowlevel.losses.sums import LossSums
from lowlevel.optim import loss_scale
from lowlevel.optim.loss_scale import LossScale
from lowlevel.optim.optimizer import build_optimizer, optimizer_tensors


class _Poison(torch.autograd.Function):
    """Identity whose gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


@dataclass
class Faulty:
    """SFT whose first `bad` micro-batches have a loss times `loss_factor`, plus `loss_offset`, and a gradient times
    `grad_factor`.
    """

    bad: float
    loss_factor: float = 1.0
    grad_factor: float = 1.0
    loss_offset: float = 0.0
    inner: object = field(default_factory=lambda: helpers.sft(4))
    seen: list = field(default_factory=list)
    name: str = "sft"

    def micro_batches(self, examples):
        return self.inner.micro_batches(examples)

    def count(self, batch):
        return self.inner.count(batch)

    def loss(self, policy, batch):
        self.seen.append((batch.data_rows, batch.input_ids.clone(), policy.dropout.token_keys.clone()))
        loss = self.inner.loss(policy, batch).loss
        if len(self.seen) <= self.bad:
            loss = _Poison.apply(loss, self.grad_factor) * self.loss_factor + self.loss_offset
        return LossSums(loss=loss, metrics={})


def trainer(tiny_base, optim="paged_adamw_32bit", dropout=0.1):
    policy = helpers.make_policy(tiny_base, dropout=dropout)
    return policy, build_optimizer(policy.flat.weights, TrainConfig(learning_rate=1e-2, optim=optim))


def state_of(policy, optimizer):
    return [policy.flat.weights.detach().clone(), *optimizer_tensors(optimizer).values()]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_the_same_scales_as_grad_scaler(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    overflows = {0, 1, 3, 6, 11, 12, 20, 31}  # also after one and two good attempts
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=3)
    ours = LossScale.for_precision("fp16")
    theirs.scale(torch.ones(1))  # it makes its state at the first use
    scales = []
    for attempt in range(40):
        weight.grad = torch.tensor([1.0, float("inf") if attempt in overflows else 2.0])
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        ours.accepts(math.inf if attempt in overflows else 1.0)
        scales.append(ours.scale)
        assert ours.scale == theirs.get_scale(), attempt
        assert ours.good_steps == theirs._get_growth_tracker()
    assert ours.skipped_steps == len(overflows)
    changes = {b / a for a, b in zip(scales, scales[1:], strict=False)}
    assert changes == {0.5, 1.0, 2.0}, "the pattern halves, keeps and doubles"


def test_the_constants_are_grad_scalers():
    scaler = torch.amp.GradScaler("cpu")
    assert loss_scale.INITIAL_SCALE == scaler._init_scale and loss_scale.GROWTH_INTERVAL == scaler.get_growth_interval()
    assert scaler.get_growth_factor() == 2.0 and scaler.get_backoff_factor() == 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_fp16_the_scale_is_1_for_ever(precision, monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    scale = LossScale.for_precision(precision)
    for finite in (True, True, False, True, True, True, True, False):
        scale.accepts(1.0 if finite else math.nan)
        assert scale.scale == 1.0 and not scale.enabled


def test_the_scale_cancels(tiny_base):
    """A power of two: loss, gradient and update are the same bits with and without it."""
    outcomes = []
    for scale in (LossScale.for_precision("fp32"), LossScale(), LossScale(scale=2.0**-3)):
        policy, optimizer = trainer(tiny_base)
        result = helpers.step(
            policy, helpers.sft(4), helpers.ragged_examples(), optimizer, scale=scale, max_grad_norm=1.0
        )
        outcomes.append((result.metrics["loss"], result.grad_norm, *state_of(policy, optimizer)))
    for outcome in outcomes[1:]:
        assert outcome[:2] == outcomes[0][:2] and same(outcome[2:], outcomes[0][2:])


def test_an_overflow_repeats_the_same_batch_and_applies_one_update(tiny_base):
    outcomes = []
    for bad in (0, 2):  # two micro-batches a step: both of the first attempt overflow, or neither
        policy, optimizer = trainer(tiny_base)
        method, scale = Faulty(bad=bad, grad_factor=float("inf")), LossScale()
        result = helpers.step(policy, method, helpers.ragged_examples(), optimizer, scale=scale)
        outcomes.append((method, scale, result, state_of(policy, optimizer)))
    (_, clean_scale, clean, clean_state), (method, scale, result, state) = outcomes
    assert (clean_scale.scale, clean_scale.skipped_steps) == (65536.0, 0)
    assert (scale.scale, scale.skipped_steps, scale.skips_in_a_row, scale.good_steps) == (32768.0, 1, 0, 1)
    assert len(method.seen) == 4
    for first, again in zip(method.seen[:2], method.seen[2:], strict=True):
        assert first[0] == again[0] and torch.equal(first[1], again[1])
        assert torch.equal(first[2], again[2]), "the same dropout keys too"
    assert (result.metrics, result.grad_norm) == (clean.metrics, clean.grad_norm), "counted once"
    assert (len(result.rows), result.num_tokens, result.supervised_tokens) == (
        len(clean.rows), clean.num_tokens, clean.supervised_tokens)  # fmt: skip
    assert same(state, clean_state)


def test_only_the_second_micro_batch_overflowing_is_an_overflow_too(tiny_base):
    policy, optimizer = trainer(tiny_base)
    method, scale = Faulty(bad=99, inner=helpers.sft(4)), LossScale()
    original = Faulty.loss

    def second_is_bad(self, policy, batch):
        self.grad_factor = float("nan") if len(self.seen) == 1 else 1.0
        return original(self, policy, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Faulty, "loss", second_is_bad)
        helpers.step(policy, method, helpers.ragged_examples(), optimizer, scale=scale)
    assert scale.skipped_steps == 1 and len(method.seen) == 4
    assert policy.flat.weights.isfinite().all()


def test_more_than_ten_skips_in_a_row_stop_the_run(tiny_base):
    policy, optimizer = trainer(tiny_base)
    before, scale = state_of(policy, optimizer), LossScale()
    method = Faulty(bad=20, grad_factor=float("inf"))  # ten attempts of two micro-batches
    helpers.step(policy, method, helpers.ragged_examples(), optimizer, scale=scale)
    assert (scale.skipped_steps, scale.scale) == (10, 2.0**6)
    assert not same(before, state_of(policy, optimizer))
    policy, optimizer = trainer(tiny_base)
    scale = LossScale()
    with pytest.raises(NonFiniteError, match=r"step 1: gradient norm is (inf|nan) after 11 halvings"):
        method = Faulty(bad=22, grad_factor=float("inf"))
        helpers.step(policy, method, helpers.ragged_examples(), optimizer, scale=scale)
    assert scale.skipped_steps == 11 and len(method.seen) == 22
    assert same(before, state_of(policy, optimizer))


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "adamw"])
@pytest.mark.parametrize("gradient", ["loss_offset", "loss_factor"], ids=["finite gradient", "NaN gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scale", [LossScale, lambda: LossScale.for_precision("fp32")], ids=["fp16", "fp32"])
def test_a_loss_that_is_not_finite_changes_nothing(tiny_base, optim, value, scale, gradient):
    policy, optimizer = trainer(tiny_base, optim)
    helpers.step(policy, helpers.sft(4), helpers.ragged_examples(), optimizer)  # a state to keep
    before = state_of(policy, optimizer)
    rows = r"\[10, 17, 24, 31, 38, 45, 52, 59\]"
    with pytest.raises(NonFiniteError, match=rf"step 6: loss is (nan|inf); nothing was updated; data rows {rows}"):
        faulty = Faulty(bad=1, **{gradient: value})
        helpers.step(policy, faulty, helpers.ragged_examples(), optimizer, scale=scale(), number=5)
    assert same(before, state_of(policy, optimizer))


def test_a_bad_gradient_in_fp32_stops_at_once(tiny_base):
    policy, optimizer = trainer(tiny_base)
    before = state_of(policy, optimizer)
    method = Faulty(bad=1, grad_factor=float("nan"))
    with pytest.raises(NonFiniteError, match="step 1: gradient norm is nan; nothing was updated"):
        helpers.step(policy, method, helpers.ragged_examples(), optimizer)
    assert len(method.seen) == 2 and same(before, state_of(policy, optimizer))


def test_clipping_is_torchs(tiny_base):
    """The norm is the one before clipping, and the gradient after it has at most the length asked for."""
    policy = helpers.make_policy(tiny_base)
    whole = helpers.step(policy, helpers.sft(), helpers.ragged_examples())
    free = policy.flat.grad.clone()
    assert whole.grad_norm == pytest.approx(free.double().norm().item(), rel=1e-6)
    for bound in (0.01, whole.grad_norm * 2):
        clipped = helpers.step(policy, helpers.sft(), helpers.ragged_examples(), max_grad_norm=bound)
        assert clipped.grad_norm == whole.grad_norm
        reference = torch.nn.Parameter(torch.zeros_like(free))
        reference.grad = free.clone()
        torch.nn.utils.clip_grad_norm_([reference], bound)
        torch.testing.assert_close(policy.flat.grad, reference.grad, rtol=1e-6, atol=0)

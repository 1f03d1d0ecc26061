"""Faults planted in one place of a model are found in that place."""

from dataclasses import dataclass, field
from typing import Any

import helpers
import pytest
import torch

from lowlevel.errors import NonFiniteError
from lowlevel.losses.sums import LossSums
from lowlevel.optim.loss_scale import LossScale
from lowlevel.running.failure import write_failure
from lowlevel.running.forensics import examine_error, explained

LAYER = "model.layers.1"


def fail(policy, method, examples, **keys) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as caught:
        helpers.step(policy, method, examples, **keys)
    return caught.value


def report_of(policy, method, examples, **keys):
    before, hooks = policy.flat.weights.detach().clone(), count_hooks(policy)
    report = examine_error(fail(policy, method, examples, **keys), policy, method)
    assert torch.equal(before.nan_to_num(), policy.flat.weights.nan_to_num()), "no weight is touched"
    assert not policy.flat.grad.any() and not policy.layers.compiled
    assert count_hooks(policy) == hooks
    return report


def count_hooks(policy) -> int:
    views = sum(len(view._backward_hooks or ()) for view in policy.flat.views.values())
    return views + sum(len(m._forward_hooks) for m in policy.model.modules())


def module(policy, ending: str):
    (found,) = (m for name, m in policy.model.named_modules() if name.endswith(ending))
    return found


@dataclass
class BadLoss:
    """SFT whose loss, or its gradient, is spoilt after everything else was computed."""

    factor: Any = None
    grad: Any = None
    inner: Any = field(default_factory=lambda: helpers.sft(4))
    name: str = "sft"

    def micro_batches(self, examples):
        return self.inner.micro_batches(examples)

    def count(self, batch):
        return self.inner.count(batch)

    def loss(self, policy, batch):
        loss = self.inner.loss(policy, batch).loss
        if self.grad is not None:
            loss.register_hook(lambda gradient: gradient * self.grad)
        return LossSums(loss=loss * self.factor if self.factor is not None else loss, metrics={})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_nan_in_a_frozen_weight(tiny_base, kind, checkpointing):
    policy = helpers.make_policy(tiny_base, dropout=0.1, checkpointing=checkpointing)
    method = helpers.sft(4) if kind == "sft" else helpers.dpo(4)
    examples = helpers.ragged_examples() if kind == "sft" else helpers.ragged_pairs()
    with torch.no_grad():
        module(policy, f"{LAYER}.mlp.up_proj.base_layer").weight[3, 5] = float("nan")
    found = report_of(policy, method, examples).finding
    assert found.module == "layers.1.mlp.up_proj.base_layer" and "whose weights are not finite" in found.what
    assert found.where == ("forward of the policy" if kind == "sft" else "forward of the reference")
    assert found.weights == ("layers.1.mlp.up_proj.base_layer.weight",)
    sizes = [abs(value["value"]) for value in found.inputs]
    assert len(sizes) == 8 and sizes == sorted(sizes, reverse=True) and len(found.inputs[0]["at"]) == 3
    assert set(found.data_rows) == {example.row for example in examples[:4]}, "all of the first micro-batch"


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_inf_in_the_adapter(tiny_base, part):
    policy = helpers.make_policy(tiny_base)
    with torch.no_grad():
        module(policy, f"{LAYER}.self_attn.v_proj.{part}.trained").weight[0, 0] = float("inf")
    report = report_of(policy, helpers.dpo(4), helpers.ragged_pairs())
    assert report.finding.module == f"layers.1.self_attn.v_proj.{part}.trained"
    assert report.finding.where == "forward of the policy", "the reference has no trained adapter"


def test_one_damaged_row_among_packed_ones(tiny_base):
    policy, examples = helpers.make_policy(tiny_base), helpers.ragged_examples()
    for example in examples:
        example.input_ids[:] = example.input_ids % 200 + 3
    examples[5].input_ids[-3] = 310
    with torch.no_grad():
        policy.causal_lm.get_input_embeddings().weight[310] = float("inf")
    report = report_of(policy, helpers.sft(2, packing=True), examples)
    assert report.finding.module == "embed_tokens" and report.finding.data_rows == (examples[5].row,)
    assert report.batch is not None and examples[5].row in report.batch.data_rows
    assert report.data_rows != report.batch.data_rows and set(report.data_rows) == {e.row for e in examples}


def test_a_damaged_lm_head_is_no_module_but_has_its_name(tiny_base):
    policy = helpers.make_policy(tiny_base)
    with torch.no_grad():
        policy.lm_head_weight[0, 0] = float("nan")
    report = report_of(policy, helpers.sft(4), helpers.ragged_examples())
    assert report.finding.module == "lm_head" and len(report.finding.data_rows) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_bad_by_itself(tiny_base, value):
    report = report_of(helpers.make_policy(tiny_base), BadLoss(factor=value), helpers.ragged_examples())
    assert (report.quantity, report.finding.module) == ("loss", "the loss")
    assert "all modules and log-probabilities are finite" in report.sentence


def test_a_gradient_that_is_bad_from_the_start(tiny_base):
    report = report_of(helpers.make_policy(tiny_base), BadLoss(grad=float("nan")), helpers.ragged_examples())
    assert report.quantity == "gradient norm" and report.finding.where == "backward"
    assert report.finding.module == "norm", "what arrives at the decoder's end is not finite already"
    assert len(report.finding.inputs) == 8


@pytest.mark.parametrize("disable_dropout", [False, True])
def test_the_inputs_shown_are_those_of_the_policys_pass(tiny_base, disable_dropout):
    """Not the reference's, which comes first, nor those of another dropout; the adapter's effect tells them apart."""
    policy = helpers.make_policy(tiny_base, dropout=0.5)
    method = helpers.dpo(4, disable_dropout=disable_dropout)
    with torch.no_grad():
        for name, view in policy.flat.views.items():
            view.add_(0.05 * (".lora_B." in name))
    gate, seen = module(policy, f"{LAYER}.mlp.gate_proj"), []

    def poison(_, inputs, output):
        if output.requires_grad:
            seen.append(inputs[0].detach().abs().max().item())
            output.register_hook(lambda gradient: gradient * float("inf"))

    gate.register_forward_hook(poison)
    found = report_of(policy, method, helpers.ragged_pairs()).finding
    assert found.module.startswith("layers.1.mlp.gate_proj")
    assert abs(found.inputs[0]["value"]) == pytest.approx(seen[0], rel=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_that_breaks_in_a_layer(tiny_base, checkpointing):
    """The gradient is finite down to a layer's output, and not below."""
    policy = helpers.make_policy(tiny_base, checkpointing=checkpointing)

    def poison(_, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("inf"))

    module(policy, f"{LAYER}.mlp.gate_proj").register_forward_hook(poison)
    found = report_of(policy, helpers.sft(4), helpers.ragged_examples()).finding
    assert found.where == "backward" and found.module.startswith("layers.1.mlp.gate_proj")


def test_an_overflow_at_every_scale(tiny_base):
    """fp32 in the place of fp16: a scale so large that ten halvings do not help."""
    policy = helpers.make_policy(tiny_base)
    scale = LossScale(scale=2.0**127)
    method = BadLoss(grad=2.0**100)
    error = fail(policy, method, helpers.ragged_examples(), scale=scale, number=6)
    report = examine_error(error, policy, method)
    assert (report.step, report.quantity, scale.skipped_steps) == (7, "gradient norm", 11)
    assert [attempt["loss_scale"] for attempt in report.attempts] == [2.0 ** (127 - i) for i in range(11)]
    assert report.finding is not None and report.finding.where == "backward" and report.micro_batch == 0


def test_gradients_whose_sum_alone_overflows(tiny_base):
    """Each entry is finite; the norm's square is not."""
    policy = helpers.make_policy(tiny_base)
    report = report_of(policy, BadLoss(grad=1e24), helpers.ragged_examples())
    assert report.finding is None and "their sum or its norm overflows" in report.sentence


def test_a_fault_that_does_not_come_again_is_said(tiny_base):
    policy, method = helpers.make_policy(tiny_base), BadLoss(factor=float("nan"))
    error = fail(policy, method, helpers.ragged_examples())
    method.factor = 1.0
    report = examine_error(error, policy, method)
    assert report.finding is None and "every module was finite when the step was run again eagerly" in report.sentence


def test_dropout_is_that_of_the_step(tiny_base):
    """The examination draws the masks of the failed step: its batches see the same keys."""
    policy, seen = helpers.make_policy(tiny_base, dropout=0.5), []
    method = BadLoss(factor=float("nan"))
    original = method.inner.__class__.loss

    def spy(self, policy, batch):
        seen.append(policy.dropout.token_keys.clone())
        return original(self, policy, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method.inner.__class__, "loss", spy)
        report_of(policy, method, helpers.ragged_examples(), number=3)
    assert len(seen) == 3 and torch.equal(seen[0], seen[2])


def test_layers_are_put_back_as_they_were(tiny_base, monkeypatch):
    policy, calls = helpers.make_policy(tiny_base), []
    error = fail(policy, BadLoss(factor=float("nan")), helpers.ragged_examples())
    monkeypatch.setattr(policy.layers, "compiled", True)
    monkeypatch.setattr(policy.layers, "use", lambda *, compiled: calls.append(compiled))
    examine_error(error, policy, BadLoss(factor=float("nan")))
    assert calls == [False, True]


def test_a_report_takes_the_place_of_an_older_one(tiny_base, tmp_path):
    policy, method = helpers.make_policy(tiny_base), BadLoss(factor=float("nan"))
    error = fail(policy, method, helpers.ragged_examples())
    for _ in range(2):
        told = explained(error, policy, method, tmp_path)
        assert told.exit_code == 5 and str(told).startswith(f"{error}; first not finite: ")
        assert str(told).endswith(f"see {tmp_path / 'failure'}")
    assert [path.name for path in tmp_path.iterdir()] == ["failure"]
    write_failure(examine_error(error, policy, method), tmp_path)
    assert len(list((tmp_path / "failure").iterdir())) == 2

"""Faults planted in the training path, one by one: `verify` must fail, and on the check that is about it."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

import lowlevel.loop
import lowlevel.methods.dpo
import lowlevel.methods.sft
from lowlevel.batch.layout import PackedBatch
from lowlevel.data.examples import SFTExample
from lowlevel.labels import IGNORED
from lowlevel.losses.sums import LossSums
from lowlevel.model.dropout import CounterDropout
from lowlevel.model.policy import PARENT, Policy
from lowlevel.verification.exact import ExactModel, sequences_of
from lowlevel.verification.report import run_checks


def failures(subject) -> set[str]:
    return {f"{check.group}: {check.name}" for check in run_checks(subject) if not check.ok}


@pytest.fixture(params=["sft", "dpo"])
def subject(request):
    return request.getfixturevalue(request.param)


def test_without_a_fault_every_check_holds(subject):
    assert failures(subject) == set()


def test_one_token_off_in_the_forward_pass(sft, monkeypatch):
    """Too little for the mean of all tokens: the worst one is held apart."""
    plain = ExactModel.token_scores

    def off(self, weights, sequence):
        scores = plain(self, weights, sequence).clone()
        if len(scores) == longest:
            scores[0] += 1.05e-4  # the bound is 1e-4
        return scores

    longest = max(len(one.places) for example in sft.examples for one in sequences_of(example, False))
    monkeypatch.setattr(ExactModel, "token_scores", off)
    assert failures(sft) == {"loss: its worst token, policy"}


def change_segments(monkeypatch, change):
    """`change(segment)` on every segment that the methods lay out."""
    sft, pair = lowlevel.methods.sft.sft_segment, lowlevel.methods.dpo.pair_segments
    monkeypatch.setattr(lowlevel.methods.sft, "sft_segment", lambda *a: change(sft(*a)))
    monkeypatch.setattr(lowlevel.methods.dpo, "pair_segments", lambda *a, **how: list(map(change, pair(*a, **how))))


def test_labels_shifted_twice(subject, monkeypatch):
    change_segments(monkeypatch, lambda s: replace(s, targets=np.append(s.targets[1:], IGNORED)))
    assert {"masking: targets as the rows say", "masking: first reply token is scored"} <= failures(subject)


def test_prompt_tokens_in_the_loss(subject, monkeypatch):
    def learn_prompt(segment):
        targets = segment.targets.copy()
        targets[:2] = segment.input_ids[1:3]
        return replace(segment, targets=targets)

    change_segments(monkeypatch, learn_prompt)
    found = failures(subject)
    assert {"masking: targets as the rows say", "masking: no gradient in prompts and padding"} <= found


def test_padding_in_the_loss(subject, monkeypatch):
    def learn_padding(segment):
        ids = np.append(segment.input_ids, [0, 0])
        positions = np.append(segment.position_ids, segment.position_ids[-1] + np.arange(1, 3))
        branches = np.append(segment.branch_ids, segment.branch_ids[[-1, -1]])
        return replace(
            segment,
            input_ids=ids,
            position_ids=positions,
            branch_ids=branches,
            numbers=np.append(segment.numbers, segment.numbers[[-1, -1]]),
            targets=np.append(segment.targets, [0, 0]),
        )

    change_segments(monkeypatch, learn_padding)
    found = failures(subject)
    assert {"masking: targets as the rows say", "masking: no gradient in prompts and padding"} <= found


def test_eos_masked_in_the_layout(subject, monkeypatch):
    def forget_end(segment):
        return replace(segment, targets=np.where(segment.targets == 2, IGNORED, segment.targets))

    change_segments(monkeypatch, forget_end)
    assert {"masking: replies end with end of turn", "masking: targets as the rows say"} <= failures(subject)


def test_eos_masked_in_the_examples(sft):
    examples = [
        SFTExample(x.row, x.where, x.input_ids, np.where(x.labels == 2, IGNORED, x.labels)) for x in sft.examples
    ]
    found = failures(replace(sft, examples=tuple(examples)))
    assert {"masking: replies end with end of turn", "masking: targets as the rows say"} <= found


def test_mean_in_the_place_of_the_sum(dpo, monkeypatch):
    plain = PackedBatch.sequence_sums
    monkeypatch.setattr(PackedBatch, "sequence_sums", lambda batch, values: plain(batch, values) / batch.lengths)
    found = failures(dpo)
    assert {"loss: completion log-probability, policy", "gradients: step, float64 autograd"} <= found


def test_dropout_on_in_the_reference(dpo, monkeypatch):
    """In the frozen adapter too, where it has an effect: the trained one is off in a reference pass."""

    @contextmanager
    def noisy(policy):
        policy.activate(parent=True, trained=False)
        with torch.no_grad():
            yield
        policy.activate(parent=True, trained=True)

    monkeypatch.setattr(Policy, "reference", noisy)
    assert failures(dpo) == {"reference: dropout off"}, "no number changes where the frozen adapter has no dropout"
    for salt, layer in enumerate(dpo.policy.lora_layers):
        module = CounterDropout(0.3, salt, layer.in_features, dpo.policy.dropout, torch.device("cpu"))
        monkeypatch.setitem(layer.lora_dropout._modules, PARENT, module)
    assert {"reference: dropout off", "reference: unchanged by: another dropout key"} <= failures(dpo)


@pytest.mark.parametrize(
    "parent, trained, caught",
    [
        (False, False, {"reference: log-ratios at step 0", "loss: forward pass, reference"}),
        (True, True, {"reference: unchanged by: another trained adapter", "loss: forward pass, reference"}),
    ],
    ids=["base", "policy"],
)
def test_the_wrong_adapter_as_reference(dpo, monkeypatch, parent, trained, caught):
    @contextmanager
    def wrong(policy):
        keys, policy.dropout.token_keys = policy.dropout.token_keys, None
        policy.activate(parent=parent, trained=trained)
        with torch.no_grad():
            yield
        policy.activate(parent=True, trained=True)
        policy.dropout.token_keys = keys

    monkeypatch.setattr(Policy, "reference", wrong)
    assert caught <= failures(dpo)


def test_label_smoothing_ignored(dpo, monkeypatch):
    plain = lowlevel.methods.dpo.preference_loss
    forgetful = lambda config: plain(config.model_copy(update={"label_smoothing": 0.0}))  # noqa: E731
    monkeypatch.setattr(lowlevel.methods.dpo, "preference_loss", forgetful)
    found = failures(replace(dpo, method=replace(dpo.method)))  # a method keeps its loss
    assert {"loss: loss of a pair", "accounting: label_smoothing reaches the loss"} <= found
    assert "gradients: loss in the log-probabilities" in found


def test_a_gradient_that_is_not_unscaled(subject, monkeypatch):
    plain = lowlevel.loop.optimizer_step

    def scaled(execution, optimizer, batches, loss_scale, **keys):
        result = plain(execution, optimizer, batches, loss_scale, **keys)
        execution.policy.flat.grad.mul_(loss_scale.scale)
        return result

    monkeypatch.setattr(lowlevel.loop, "optimizer_step", scaled)
    assert failures(subject) == {"accounting: loss scale divided out"}


def test_accumulation_as_a_mean_of_means(sft, monkeypatch):
    plain = lowlevel.methods.sft.SFT.loss

    def mean(method, policy, batch):
        return LossSums(plain(method, policy, batch).loss / batch.num_scored, {})

    monkeypatch.setattr(lowlevel.methods.sft.SFT, "loss", mean)
    monkeypatch.setattr(lowlevel.methods.sft.SFT, "count", lambda method, batch: 1)
    found = failures(sft)
    assert {"accounting: step loss", "accounting: counts of the step"} <= found
    assert "invariances: 4 x 1 = 1 x 4: gradient" in found


def test_accumulation_as_a_mean_of_means_in_pairs(dpo, monkeypatch):
    plain = lowlevel.methods.dpo.DPO.loss

    def mean(method, policy, batch):
        sums, count = plain(method, policy, batch), len(batch.data_rows)
        return LossSums(sums.loss / count, {name: value / count for name, value in sums.metrics.items()})

    monkeypatch.setattr(lowlevel.methods.dpo.DPO, "loss", mean)
    monkeypatch.setattr(lowlevel.methods.dpo.DPO, "count", lambda method, batch: 1)
    assert {"accounting: step loss", "accounting: counts of the step"} <= failures(dpo)


def test_chosen_and_rejected_swapped_in_one_row(dpo, monkeypatch):
    row, plain = dpo.examples[1].row, lowlevel.methods.dpo.pair_segments

    def swapped(pair, number, *, shared):
        turned = replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)
        return plain(turned if pair.row == row else pair, number, shared=shared)

    monkeypatch.setattr(lowlevel.methods.dpo, "pair_segments", swapped)
    assert "masking: targets as the rows say" in failures(dpo)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_a_loss_that_sorts_pairs_holds_with_several_micro_batches_a_step(make, loss_type):
    subject = make("dpo", examples=8, train={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
                   data={"packing": False}, dpo={"loss_type": loss_type})  # fmt: skip
    assert len(subject.examples) == 2 and len(subject.batches()) == 1
    assert not [one.name for one in run_checks(subject) if not one.ok]

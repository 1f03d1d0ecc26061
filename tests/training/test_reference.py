"""DPO's reference: the same weights without the trained adapter, bit for bit, at the start and for good."""

import math

import helpers
import numpy as np
import pytest
import torch
from peft import PeftModel

from lowlevel.batch.layout import attention_mask
from lowlevel.config.schema import ModelConfig, TrainConfig
from lowlevel.hashing import key32
from lowlevel.losses import token_logps
from lowlevel.model.adapters import read_adapter_weights
from lowlevel.model.base import base_sha256, load_base
from lowlevel.model.policy import PARENT, TRAINED
from lowlevel.optim.optimizer import build_optimizer

LN2 = float(np.float32(math.log(2)))
cases = pytest.mark.parametrize("quantised", [False, True], ids=["fp32", "nf4"])
layouts = pytest.mark.parametrize("packing", [False, True], ids=["two rows", "shared prompt"])
stacks = pytest.mark.parametrize("stacked", [False, True], ids=["base", "base+parent"])


@cases
@layouts
@stacks
def test_step_0_is_exactly_ln_2(tiny_base, parent_adapter, quantised, packing, stacked):
    policy = helpers.make_policy(
        tiny_base, quantised=quantised, dropout=0.1, checkpointing=True, randomize=False,
        parent=parent_adapter if stacked else None,
    )  # fmt: skip
    for disable_dropout in (True, False):
        method = helpers.dpo(4, packing=packing, disable_dropout=disable_dropout)
        batch = method.micro_batches(helpers.ragged_pairs())[0]
        policy.dropout.set_micro_batch(batch.dropout_keys, key32(1, 0))
        with policy.reference():
            reference = helpers.completion_logps(policy, batch)
        assert all(map(torch.equal, helpers.completion_logps(policy, batch), reference))
        metrics = helpers.step(policy, method, helpers.ragged_pairs()).metrics
        assert metrics["loss"] == LN2
        assert metrics["rewards/accuracies"] == 0.5
        assert [metrics[f"rewards/{name}"] for name in ("chosen", "rejected", "margins")] == [0, 0, 0]
        assert metrics["logps/chosen"] == metrics["logps/ref_chosen"] < -1
        assert policy.flat.grad.norm() > 1e-2, "the loss is flat in A at B = 0, but not in B"


def weights_of(policy, adapter) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in policy.model.named_parameters() if f".{adapter}." in n}


@cases
@stacks
def test_training_leaves_base_and_parent_as_they_were(tiny_base, parent_adapter, quantised, stacked):
    parent = parent_adapter if stacked else None
    policy = helpers.make_policy(tiny_base, quantised=quantised, randomize=False, parent=parent)
    optimizer = build_optimizer(policy.flat.weights, TrainConfig(learning_rate=1e-3, optim="adamw"))
    before, digest, names = weights_of(policy, PARENT), base_sha256(policy.model), policy.trainable_names()
    assert bool(before) == stacked
    results = [
        helpers.step(
            policy, helpers.dpo(4, packing=True), helpers.ragged_pairs(), optimizer, number=n, max_grad_norm=1.0
        )
        for n in range(20)
    ]
    assert results[-1].metrics["loss"] < 0.3 < LN2, "trained, so that there was something to leave alone"
    assert results[-1].metrics["logps/ref_chosen"] == results[0].metrics["logps/ref_chosen"]
    assert results[-1].metrics["logps/ref_rejected"] == results[0].metrics["logps/ref_rejected"]
    after = weights_of(policy, PARENT)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert base_sha256(policy.model) == digest
    assert policy.trainable_names() == names
    if stacked:  # and the parent is what its file says
        saved = read_adapter_weights(parent_adapter)
        assert {n.replace(f".{PARENT}.", "."): t for n, t in before.items()}.keys() == saved.keys()
        assert all(torch.equal(t, saved[n.replace(f".{PARENT}.", ".")]) for n, t in before.items())


def test_the_base_hash_sees_one_changed_weight_and_no_adapter(tiny_base):
    policy = helpers.make_policy(tiny_base, quantised=True)
    digest = base_sha256(policy.model)
    assert digest == base_sha256(load_base(ModelConfig(name=str(tiny_base)), helpers.CPU))
    helpers.fill_lora_b(policy, seed=9)
    assert base_sha256(policy.model) == digest
    projection = policy.lora_layers[3].get_base_layer().weight
    projection.data[0, 0] ^= 1
    assert base_sha256(policy.model) != digest
    projection.data[0, 0] ^= 1
    assert base_sha256(policy.model) == digest
    projection.quant_state.state2.absmax[0] *= 1.001  # double quantisation: the constants' constants
    assert base_sha256(policy.model) != digest


@stacks
def test_the_trainable_set_is_the_trained_adapter_and_stays_so(tiny_base, parent_adapter, stacked):
    policy = helpers.make_policy(tiny_base, parent=parent_adapter if stacked else None)
    names = policy.trainable_names()
    assert len(names) == 2 * 14 and all(f".{TRAINED}." in name for name in names)
    assert names == list(policy.flat.views)
    assert sum(p.numel() for p in policy.model.parameters() if p.requires_grad) == policy.flat.weights.numel()
    with policy.reference():
        assert not torch.is_grad_enabled()
    assert policy.trainable_names() == names and torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="stop"), policy.reference():
        raise RuntimeError("stop")
    assert policy.trainable_names() == names
    (batch,) = helpers.dpo().micro_batches(helpers.ragged_pairs())
    first = helpers.completion_logps(policy, batch)
    with policy.reference():
        reference = helpers.completion_logps(policy, batch)
    assert not torch.equal(first[0], reference[0]), "the adapter has an effect"
    assert all(map(torch.equal, helpers.completion_logps(policy, batch), first)), "and is on again"


def test_dropout_moves_the_policy_and_never_the_reference(tiny_base, parent_adapter):
    policy = helpers.make_policy(tiny_base, dropout=0.4, parent=parent_adapter)
    noisy, quiet = helpers.dpo(disable_dropout=False), helpers.dpo()
    pairs = helpers.ragged_pairs()
    results = [helpers.step(policy, noisy, pairs, number=n).metrics for n in range(3)]
    results.append(helpers.step(policy, quiet, pairs, number=0).metrics)
    for side in ("chosen", "rejected"):
        assert len({metrics[f"logps/{side}"] for metrics in results}) == 4
        assert len({metrics[f"logps/ref_{side}"] for metrics in results}) == 1


@cases
@layouts
@stacks
def test_the_reference_is_what_plain_peft_loads(tiny_base, parent_adapter, quantised, packing, stacked):
    policy = helpers.make_policy(
        tiny_base, quantised=quantised, dropout=0.1, parent=parent_adapter if stacked else None
    )
    (batch,) = helpers.dpo(packing=packing, row_length=256).micro_batches(helpers.ragged_pairs())
    policy.dropout.set_micro_batch(batch.dropout_keys, key32(1, 0))
    with policy.reference():
        reference = torch.cat(helpers.completion_logps(policy, batch))
    plain = load_base(ModelConfig(name=str(tiny_base), load_in_4bit=quantised), helpers.CPU)
    if stacked:
        plain = PeftModel.from_pretrained(plain, parent_adapter).eval().get_base_model()
    with torch.no_grad():
        hidden = plain.get_decoder()(
            input_ids=batch.input_ids, attention_mask=attention_mask(batch), position_ids=batch.position_ids
        ).last_hidden_state
        scored = hidden.flatten(0, 1)[batch.scored_positions]
        logps = token_logps(scored, plain.get_output_embeddings().weight, batch.scored_targets)
    assert torch.equal(batch.sequence_sums(logps), reference)
    if stacked:  # the parent has an effect: without it these would be other numbers
        bare = helpers.make_policy(tiny_base, quantised=quantised)
        with bare.reference():
            assert not torch.equal(torch.cat(helpers.completion_logps(bare, batch)), reference)

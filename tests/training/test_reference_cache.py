"""Cached reference numbers are the live pass's, bit for bit: single steps by metrics and flat gradient."""

import json
from dataclasses import replace

import helpers
import pytest
import torch
from reference_caching import PAIRS, SHAPE, SPANS, cached, only, recording, shards
from safetensors.torch import load_file

from lowlevel.config.offline import DPOConfig
from lowlevel.execution import signature_of
from lowlevel.hashing import key32
from lowlevel.methods.dpo import DPO
from lowlevel.reference_cache import content_sha256, with_blanks

STEPS = [
    (packing, shape, attention, dropout)
    for packing in (True, False)
    for shape, attention in ((None, "sdpa"), (None, SPANS), (SHAPE, SPANS))
    for dropout in (True, False)
]


@pytest.mark.parametrize(("packing", "shape", "attention", "dropout"), STEPS)
def test_a_cached_step_is_the_live_step_bit_for_bit(
    tiny_base, parent_adapter, tmp_path, passes, packing, shape, attention, dropout
):
    method = DPO(DPOConfig(disable_dropout=not dropout), 2, 64, packing, shape)
    policy = helpers.make_policy(tiny_base, dropout=0.3, parent=parent_adapter, attention=attention)
    live = helpers.step(policy, method, PAIRS)
    wanted, count = policy.flat.grad.clone(), len(method.micro_batches(PAIRS))
    assert count > 1 and live.metrics["rewards/margins"] != 0
    for name, hits, computed in (("cold", 0, count), ("warm", count, 0)):
        cache = cached(policy, method, tmp_path, parent=parent_adapter)
        passes.clear()
        result = helpers.step(policy, method, PAIRS, execution=cache)
        assert result.metrics == live.metrics and result.grad_norm == live.grad_norm, name
        assert torch.equal(policy.flat.grad, wanted), name
        assert (cache.hits, cache.computed) == (hits, computed)
        assert len(passes) == (count if name == "cold" else 2), "two of the warm ones are verified"
        cache.flush()
    assert len(shards(tmp_path)) == 1


@pytest.mark.parametrize("loss_type", ["ipo", "rpo", "sigmoid_norm"])
def test_a_cache_of_one_loss_serves_another(tiny_base, tmp_path, loss_type):
    policy = helpers.make_policy(tiny_base, attention=SPANS)
    first, other = (DPO(DPOConfig(loss_type=name, beta=0.4), 4, 64, True, SHAPE) for name in ("sigmoid", loss_type))
    cache = cached(policy, first, tmp_path)
    helpers.step(policy, first, PAIRS, execution=cache)
    cache.flush()
    wanted = helpers.loss_and_gradient(policy, other, PAIRS)
    cache = cached(policy, other, tmp_path)
    loss, gradient = helpers.loss_and_gradient(policy, other, PAIRS, execution=cache)
    assert loss == wanted[0] and torch.equal(gradient, wanted[1])
    assert cache.computed == 0 < cache.hits


def test_compiled_layers_have_entries_of_their_own(tiny_base, tmp_path):
    torch._dynamo.reset()
    policy = helpers.make_policy(tiny_base, dropout=0.3, attention=SPANS)
    method = DPO(DPOConfig(), 4, 64, True, SHAPE)
    cache = cached(policy, method, tmp_path)
    helpers.step(policy, method, PAIRS, execution=cache)
    cache.flush()
    policy.layers.use(compiled=True)
    live = helpers.loss_and_gradient(policy, method, PAIRS)
    for computed in (True, False):
        cache = cached(policy, method, tmp_path)
        loss, gradient = helpers.loss_and_gradient(policy, method, PAIRS, execution=cache)
        assert loss == live[0] and torch.equal(gradient, live[1])
        assert bool(cache.computed) == computed and bool(cache.hits) != computed
        cache.flush()
    layers = {json.loads(path.read_text())["layers"] for path in tmp_path.glob("*/identity.json")}
    assert layers == {"compiled", "eager"} and len(shards(tmp_path)) == 2


def test_entries_are_what_completion_logps_says_and_fillers_are_0(tiny_base, tmp_path):
    policy = helpers.make_policy(tiny_base, attention=SPANS)
    method = DPO(DPOConfig(), 4, 64, True, SHAPE)
    cache, seen = recording(policy, tmp_path)
    batches = method.micro_batches(PAIRS)
    for batch in batches:
        cache.run(batch, 1.0, key32(1, 0))
    cache.flush()
    sums = method.loss(policy, seen[0]).metrics
    chosen, rejected = seen[0].reference_logps.chunk(2)
    assert (sums["logps/ref_chosen"], sums["logps/ref_rejected"]) == (chosen.sum(), rejected.sum())
    entries = load_file(only(shards(tmp_path)))
    assert entries.keys() == {content_sha256(batch) for batch in batches}
    for batch, given in zip(batches, seen, strict=True):
        with policy.reference():
            chosen, rejected = helpers.completion_logps(policy, batch)
        entry, pairs = entries[content_sha256(batch)], len(batch.real)
        assert entry.dtype == torch.float32 and torch.equal(entry, given.reference_logps)
        assert torch.equal(entry[:pairs], chosen) and torch.equal(entry[pairs:], rejected)
        assert torch.equal(entry != 0, batch.real.repeat(2))
    assert not all(batch.real.all() for batch in batches)


def test_a_captured_graph_would_see_the_reference(tiny_base):
    """It copies every tensor of a batch into its own, and has another signature where there are others."""
    (batch,) = helpers.dpo(8, packing=True, row_length=256).micro_batches(PAIRS)
    given = replace(batch, reference_logps=torch.zeros(len(batch.lengths)), content="x")
    assert signature_of(given) == signature_of(with_blanks(batch)), "the rehearsal captures what the run replays"
    assert "reference_logps" in given.tensors() and "reference_logps" not in batch.tensors()
    assert signature_of(given) != signature_of(batch) == signature_of(replace(batch, content="x"))

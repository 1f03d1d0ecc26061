"""Joined linear layers: which ones, their numbers, and that they follow the adapters."""

import pytest
import torch
from helpers import fill_lora_b, make_policy, save_random_adapter

from lowlevel.sampling import FastSampler, Sampling
from lowlevel.sampling.cached_model import CachedModel

PROMPTS = [[5, 90, 17, 4], [33, 8]]


def test_layers_with_the_same_input_are_joined_and_the_model_stays_as_it_is(tiny_base):
    policy = make_policy(tiny_base, quantised=True)
    names = [name for name, _ in policy.model.named_modules()]
    model = CachedModel(policy.causal_lm, policy.placement)
    model.join()
    joined = [[place.name for place in group.places] for group in model.joined.groups]
    assert joined == 2 * [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [name for name, _ in policy.model.named_modules()] == names
    assert model.joined_bytes() == 2 * 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)


def test_joined_layers_compute_what_the_layers_compute(tiny_base, tmp_path):
    """From 4-bit weights, on a frozen adapter; again after an update; again with adapters switched off."""
    policy = make_policy(tiny_base, quantised=True, parent=save_random_adapter(tiny_base, tmp_path / "parent"))
    joined, plain = (FastSampler(policy.model, policy.placement, [7], join=join) for join in (True, False))
    seen = set()
    for seed, parent, trained in ((0, True, True), (1, True, True), (1, True, False), (1, False, False)):
        fill_lora_b(policy, seed)
        policy.activate(parent=parent, trained=trained)
        found, expected = (one.sample(PROMPTS, Sampling(10)) for one in (joined, plain))
        for mine, theirs in zip(found, expected, strict=True):
            assert mine[0].ids.tolist() == theirs[0].ids.tolist()
            assert mine[0].logps == pytest.approx(theirs[0].logps, abs=2e-5)
        seen.add(tuple(found[0][0].logps))
    assert len(seen) == 4


def test_a_pass_that_fails_goes_on_in_a_simpler_mode(tiny_base, monkeypatch):
    """The first cause is told and kept; the completions are the same."""
    policy, notes = make_policy(tiny_base), []
    sampler = FastSampler(policy.model, policy.placement, [7], notes.append, mode="compiled")

    read = sampler.model.read

    def compile_and_read(prompts):
        if sampler.model.compiled:
            raise RuntimeError("no compiler") from ValueError("deeper")
        read(prompts)

    monkeypatch.setattr(sampler.model, "read", compile_and_read)
    found = sampler.sample(PROMPTS, Sampling(10))
    expected = FastSampler(policy.model, policy.placement, [7]).sample(PROMPTS, Sampling(10))
    assert [one[0].ids.tolist() for one in found] == [one[0].ids.tolist() for one in expected]
    assert notes == ["sampling: compiled failed (no compiler); continuing eager"]
    failure = sampler.steps.failure
    assert isinstance(failure, RuntimeError) and failure.__traceback__ is None and torch.is_grad_enabled()

"""What every sampler promises, on the tiny base in fp32."""

import numpy as np
import pytest
import torch
from helpers import VOCABULARY, make_policy, save_random_adapter

from lowlevel.batch.layout import build_batch
from lowlevel.batch.segments import sft_segment
from lowlevel.errors import ConfigError
from lowlevel.hashing import key32
from lowlevel.model.attention_choice import NAMES
from lowlevel.sampling import PlainSampler, Sampling, completion_keys
from lowlevel.sampling.cached_model import misfit
from lowlevel.sampling.fast import FastSampler

STOP = 7  # among the likelier tokens of the random base
SAMPLERS = {
    "plain": PlainSampler,
    "fast": FastSampler,
    "joined": lambda *args: FastSampler(*args, join=True),
    "fast, 3 slots": lambda *args: FastSampler(*args, slots=3),  # most completions wait for one to end
}


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(3, VOCABULARY, size).tolist() for size in (5, 1, 17, 9, 3)]


@pytest.fixture(scope="module")
def policy(tiny_base, tmp_path_factory):
    """Stacked on a frozen adapter, with dropout that must not be seen."""
    parent = save_random_adapter(tiny_base, tmp_path_factory.mktemp("parent") / "adapter")
    policy = make_policy(tiny_base, parent=parent, dropout=0.3)
    policy.dropout.set_micro_batch(torch.ones(1, 8, dtype=torch.int32), 5)  # left by a training step
    return policy


@pytest.fixture(scope="module", params=SAMPLERS)
def sampler(request, policy):
    return SAMPLERS[request.param](policy.model, policy.placement, [STOP])


def trained_logps(policy, prompt, ids, temperature=1.0):
    """log pi of the completion as the trainer computes it."""
    whole = np.concatenate([prompt, ids])
    labels = np.where(np.arange(len(whole)) < len(prompt), -100, whole)
    batch = build_batch([[sft_segment(0, 0, whole, labels)]], pairs=False)
    keys, policy.dropout.token_keys = policy.dropout.token_keys, None
    with torch.no_grad():
        hidden = policy.scored_hidden_states(batch)
    policy.dropout.token_keys = keys
    logits = hidden @ policy.lm_head_weight.T / temperature
    return logits.log_softmax(-1).gather(1, batch.scored_targets[:, None])[:, 0].numpy()


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": -0.5}, {"temperature": float("nan")}])
def test_settings_that_nothing_can_be_sampled_with_are_refused(settings):
    with pytest.raises(ConfigError, match="expected at least 1 token and a temperature of at least 0"):
        Sampling(**settings)


def test_compiled_layers_are_left_out_where_there_is_no_packed_batch(tiny_base, prompts):
    """A run's sampler is made after its layers are compiled, and compares itself with plain transformers."""
    policy = make_policy(tiny_base, attention=NAMES["math"])
    plain = PlainSampler(policy.model, policy.placement, [STOP])
    before = plain.sample(prompts, Sampling(4))
    policy.layers.use(compiled=True)
    assert misfit(policy.causal_lm, policy.placement) is None
    for (one,), (other,) in zip(plain.sample(prompts, Sampling(4)), before, strict=True):
        assert one.ids.tolist() == other.ids.tolist()


@pytest.mark.parametrize("stage", ["policy", "reference", "base"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probabilities_are_the_trainers(policy, sampler, prompts, temperature, stage):
    """To 2e-5: fp32 roundings of logits of size 10. Of policy, reference (trained adapter off) and bare base."""
    policy.activate(parent=stage != "base", trained=stage == "policy")
    for group in zip(prompts, sampler.sample(prompts, Sampling(12, temperature), samples=2), strict=True):
        for one in group[1]:
            expected = trained_logps(policy, group[0], one.ids, temperature or 1.0)
            np.testing.assert_allclose(one.logps, expected, atol=2e-5)
            assert one.ids.dtype == np.int64 and one.logps.dtype == np.float32
    policy.activate(parent=True, trained=True)


def test_a_common_beginning_is_read_once(policy, sampler, monkeypatch):
    """Few-shot prompts and another one: log-probabilities are the trainer's, and few tokens are read."""
    shots = list(range(10, 50))
    prompts = [[*shots, *range(60, 61 + n % 3)] for n in range(8)] + [[5, 9, 11]]
    read: list[int] = []
    if isinstance(sampler, FastSampler):
        before = sampler.steps.read
        monkeypatch.setattr(sampler.steps, "read", lambda group: (read.append(len(group.ids)), before(group)))
    for prompt, group in zip(prompts, sampler.sample(prompts, Sampling(8), samples=2), strict=True):
        for one in group:
            np.testing.assert_allclose(one.logps, trained_logps(policy, prompt, one.ids), atol=2e-5)
    assert sum(read) < 2 * len(shots)


def test_a_completion_ends_at_its_first_stop_token_or_at_the_limit(sampler, prompts):
    found = [one for group in sampler.sample(prompts, Sampling(40, 1.0, seed=2), samples=6) for one in group]
    assert {one.ended for one in found} == {True, False}
    for one in found:
        assert (STOP in one.ids) == one.ended
        assert STOP not in one.ids[:-1]
        assert one.ended or len(one.ids) == 40


def test_a_completion_does_not_depend_on_the_batch(sampler, prompts):
    """Alone, or among others in another order: the same tokens, from the key alone."""
    sampling, keys = Sampling(12, 1.0, seed=4), completion_keys(4, len(prompts), 3)
    together = sampler.sample(prompts, sampling, samples=3)
    turned = sampler.sample(prompts[::-1], sampling, samples=3, keys=keys[::-1])[::-1]
    for prompt, own, group, other in zip(prompts, keys, together, turned, strict=True):
        for key, one, again in zip(own, group, other, strict=True):
            alone = sampler.sample([prompt], sampling, keys=[[key]])[0][0]
            assert one.ids.tolist() == again.ids.tolist() == alone.ids.tolist()
            np.testing.assert_allclose(one.logps, alone.logps, atol=2e-5)
    assert keys[2][1] == key32(4, 2, 1)
    assert len({tuple(one.ids) for one in together[0]}) == 3


def test_watching_sees_the_same_tokens(sampler, prompts):
    seen: dict[int, list[int]] = {}
    sampling = Sampling(30, 1.0)
    found = sampler.sample(prompts, sampling, samples=2, watch=lambda i, ids: seen.setdefault(i, []).extend(ids))
    assert [seen[i] for i in range(10)] == [one.ids.tolist() for group in found for one in group]

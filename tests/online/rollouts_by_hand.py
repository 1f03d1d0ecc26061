"""Completions with rewards, made up or sampled from a policy."""

from dataclasses import replace

import helpers
import numpy as np
import torch

from lowlevel.losses.token_logps import token_logps_reference
from lowlevel.online.rollouts import Rollout


def rollouts(prompts=3, size=4, *, seed=0, longest=14):
    """`prompts` groups of `size` ragged completions; every fifth one has no end, rewards are halves."""
    rng = np.random.default_rng(seed)
    found = []
    for group in range(prompts):
        prompt = rng.integers(3, helpers.VOCABULARY, rng.integers(2, 9)).astype(np.int32)
        for sample in range(size):
            ids = rng.integers(3, helpers.VOCABULARY, rng.integers(1, longest + 1)).astype(np.int32)
            logps = rng.normal(-5.0, 0.2, len(ids)).astype(np.float32)
            value, ended = float(rng.integers(0, 3)) / 2, (group * size + sample) % 5 != 4
            found.append(
                Rollout(
                    7 * group, f"data:{group}", group, sample, prompt, ids, "text", ended, logps, {"own": value}, value
                )
            )
    return found


def evens(completion_ids):
    """A reward that completions of a random model differ in: the share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def same(completion_ids):
    """A reward in which nothing differs."""
    return [1.0 for _ in completion_ids]


def groups_of(found):
    return [[x for x in found if x.group == group] for group in dict.fromkeys(x.group for x in found)]


def logps_alone(policy, x, *, temperature=1.0, reference=False):
    """Log-probability of each token of a completion, from its sequence alone and full logits in float64."""
    (batch,) = helpers.sft(1).micro_batches([helpers.Tokens(0, x.input_ids.astype(int), x.labels.astype(int))])
    policy.dropout.disable()
    policy.activate(parent=True, trained=not reference)
    with torch.no_grad():
        hidden = policy.scored_hidden_states(batch).double() / temperature
        found = token_logps_reference(hidden, policy.lm_head_weight.double(), batch.scored_targets)
    policy.activate(parent=True, trained=True)
    return found.numpy()


def on_policy(policy, found, *, temperature=1.0, shift=0.0):
    """The same completions with the policy's own log-probabilities, less `shift` times noise, as the sampler's."""
    rng, own = np.random.default_rng(1), []
    for x in found:
        logps = logps_alone(policy, x, temperature=temperature) - shift * rng.normal(size=len(x.completion_ids))
        own.append(replace(x, logps=logps.astype(np.float32)))
    return own

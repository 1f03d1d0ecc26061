"""Steps on sampled completions: independent of how they are divided, and equal to the formula put together by hand."""

import math
from dataclasses import replace

import helpers
import numpy as np
import pytest
import torch
from rollouts_by_hand import groups_of, logps_alone, on_policy, rollouts

from lowlevel.batch.layout import Shape
from lowlevel.config.online import GRPOConfig, PPOConfig, RLOOConfig
from lowlevel.methods import GRPO, PPO, RLOO
from lowlevel.online.rollouts import KeptRollouts, pairs_of
from lowlevel.online.steps import step_batches

BOUND = 1e-6
MAX_LENGTH = 16


def grpo(size=8, *, packing=False, row_length=64, shape=None, **config):
    return GRPO(GRPOConfig(max_completion_length=MAX_LENGTH, **config), size, row_length, packing, shape)


def rloo(size=8, *, packing=False, row_length=64, shape=None, **config):
    return RLOO(RLOOConfig(max_completion_length=MAX_LENGTH, **config), size, row_length, packing, shape)


CASES = {
    "dapo": (grpo, {"epsilon_high": 0.28}),
    "grpo, kl": (grpo, {"loss_type": "grpo", "beta": 0.3, "kl_estimator": "k3"}),
    "dr_grpo, masked": (grpo, {"loss_type": "dr_grpo", "mask_truncated_completions": True}),
    "dapo, masked": (grpo, {"mask_truncated_completions": True, "temperature": 0.7}),
    "cispo": (grpo, {"loss_type": "cispo"}),
    "gspo": (grpo, {"loss_type": "grpo", "importance_sampling_level": "sequence", "scale_rewards": "group"}),
    "rloo, kl": (rloo, {"beta": 0.05}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_does_not_depend_on_its_split(tiny_base, case):
    make, config = CASES[case]
    policy = helpers.make_policy(tiny_base, dropout=0.1, seed=1)
    found = make(8, **config).credit(policy, groups_of(on_policy(policy, rollouts(), shift=0.3)))
    results = {}
    layouts = [make(size, **config) for size in (12, 4, 2, 1)]
    layouts += [make(size, packing=True, row_length=row, **config) for size, row in ((1, 64), (2, 40))]
    layouts.append(make(1, packing=True, shape=Shape(32, 4, 64, 128), **config))
    for number, method in enumerate(layouts):
        results[number] = helpers.step(policy, method, found), policy.flat.grad.clone()
    (expected, gradient), *others = results.values()
    assert gradient.norm() > 1e-2
    for result, other in others:
        assert result.count == pytest.approx(expected.count)
        assert result.metrics == pytest.approx(expected.metrics, rel=1e-5, abs=2e-5)
        assert result.loss == pytest.approx(expected.loss, rel=2e-6, abs=2e-6)
        largest, mean = helpers.drifts(other, gradient)
        assert largest <= 4 * BOUND and mean <= 2 * BOUND, (largest, mean)


def by_hand(policy, found, method):
    """Loss of a step by Python's floats, from every sequence alone."""
    own, total, count = method.config, 0.0, 0.0
    for x in found:
        if not x.counted:
            continue
        new = logps_alone(policy, x, temperature=own.temperature)
        ref = logps_alone(policy, x, temperature=own.temperature, reference=True)
        logratios = new - x.logps
        level = method.settings.get("importance_sampling_level", "token")
        if level != "token":
            logratios = np.full(len(new), logratios.sum() / (len(new) if level == "sequence" else 1))
        high = own.epsilon if own.epsilon_high is None else own.epsilon_high
        terms = []
        for logratio, advantage, a, b in zip(logratios, x.advantages, new, ref, strict=True):
            r = math.exp(logratio)
            term = -min(r * advantage, min(max(r, 1 - own.epsilon), 1 + high) * advantage)
            if method.has_reference:
                term += own.beta * (math.exp(b - a) - (b - a) - 1)
            terms.append(term)
        kind = "rloo" if isinstance(method, RLOO) else own.loss_type
        total += sum(terms) / (len(terms) if kind in ("grpo", "rloo") else 1)
        count += {"grpo": 1, "rloo": 1, "dapo": len(terms), "dr_grpo": MAX_LENGTH}[kind]
    return total / count


@pytest.mark.parametrize("case", [case for case in CASES if case != "cispo"])
def test_a_step_by_hand(tiny_base, case):
    make, config = CASES[case]
    policy, method = helpers.make_policy(tiny_base, seed=3), make(4, **config)
    found = method.credit(
        policy, groups_of(on_policy(policy, rollouts(seed=2), shift=0.3, temperature=method.config.temperature))
    )
    assert helpers.step(policy, method, found).loss == pytest.approx(by_hand(policy, found, method), rel=1e-5)


def test_on_policy_the_ratio_is_one_and_truncated_completions_count_by_default(tiny_base):
    policy = helpers.make_policy(tiny_base, dropout=0.2)
    found = on_policy(policy, rollouts(), temperature=0.7)
    for masked, counted in ((False, 12), (True, 10)):
        method = grpo(temperature=0.7, mask_truncated_completions=masked)
        credited = method.credit(policy, groups_of(found))
        result = helpers.step(policy, method, credited)
        assert sum(x.counted for x in credited) == counted
        assert result.count == sum(len(x.completion_ids) for x in credited if x.counted)
        assert result.metrics["ratio"] == pytest.approx(1, abs=1e-6)
        assert result.metrics["sampling/sampling_logp_difference/max"] < 1e-4  # dropout is off


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_metrics_are_means_over_tokens_in_every_aggregation(tiny_base, loss_type):
    policy, method = helpers.make_policy(tiny_base), grpo(5, loss_type=loss_type)
    found = method.credit(policy, groups_of(on_policy(policy, rollouts(), shift=0.2)))
    result = helpers.step(policy, method, found)
    apart = np.concatenate([np.abs(logps_alone(policy, x) - x.logps) for x in found])
    assert result.metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(apart.mean(), rel=1e-4)
    assert result.metrics["sampling/sampling_logp_difference/max"] == pytest.approx(apart.max(), rel=1e-4)


def test_ppo_by_hand(tiny_base):
    """Rewards at the last token, the KL at every token, values of the head before each token."""
    policy = helpers.make_policy(tiny_base, seed=4, value_head=True)
    own = {"beta": 0.3, "gamma": 0.9, "lam": 0.8, "whiten_advantages": False, "vf_coef": 0.5}
    method = PPO(PPOConfig(max_completion_length=MAX_LENGTH, **own), 4, 64, False)
    found = on_policy(policy, rollouts(prompts=2, size=2), shift=0.1)
    fresh = method.credit(policy, groups_of(found))
    with torch.no_grad():
        policy.value_head.normal_(generator=torch.Generator().manual_seed(0))
    total, count = 0.0, 0
    for x in fresh:
        assert not x.values["values"].any()  # a new head gives 0, so an error of a value is the reward itself
        rewards = -0.3 * (x.logps - logps_alone(policy, x, reference=True))
        rewards[-1] += x.reward
        expected = [sum(0.72**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]
        assert x.advantages.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        (batch,) = helpers.sft(1).micro_batches([helpers.Tokens(0, x.input_ids.astype(int), x.labels.astype(int))])
        with torch.no_grad():
            values = (policy.scored_hidden_states(batch).double() @ policy.value_head.double()[0]).tolist()
        new = logps_alone(policy, x)
        for a, b, advantage, value in zip(new, x.logps, expected, values, strict=True):
            r, near = math.exp(a - b), min(max(value, -0.2), 0.2)
            total += -min(r * advantage, min(max(r, 0.8), 1.2) * advantage)
            total += 0.5 * 0.5 * max((value - advantage) ** 2, (near - advantage) ** 2)  # the return is A + 0
            count += 1
    result = helpers.step(policy, method, fresh)
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    split = helpers.step(policy, PPO(method.config, 1, 64, True), fresh)
    assert split.loss == pytest.approx(result.loss, rel=1e-5)


def test_a_completion_without_a_reward_leaves_group_and_loss(tiny_base):
    policy, method = helpers.make_policy(tiny_base), grpo()
    found = on_policy(policy, rollouts(prompts=1, size=4))
    rewards = [1.0, math.nan, 0.0, 0.5]
    found = [replace(x, reward=reward) for x, reward in zip(found, rewards, strict=True)]
    credited = method.credit(policy, [found])
    assert [float(x.advantages[0]) for x in credited] == [0.5, 0.0, -0.5, 0.0]
    without = method.credit(policy, [[x for x in found if math.isfinite(x.reward)]])
    one, other = (helpers.step(policy, method, part) for part in (credited, without))
    assert (one.loss, one.count) == pytest.approx((other.loss, other.count), rel=1e-6)


def test_a_step_whose_completions_are_all_masked_has_no_gradient(tiny_base):
    policy, method = helpers.make_policy(tiny_base), grpo(2, mask_truncated_completions=True)
    found = [replace(x, ended=False) for x in on_policy(policy, rollouts(prompts=1))]
    result = helpers.step(policy, method, method.credit(policy, [found]))
    assert (result.loss, result.grad_norm, result.count) == (0, 0, 1)


def test_rloo_takes_the_kl_from_the_reward(tiny_base):
    policy, method = helpers.make_policy(tiny_base, seed=5), rloo(beta=0.5)
    found = on_policy(policy, rollouts(prompts=2, size=2))
    credited = method.credit(policy, groups_of(found))
    for pair in groups_of(credited):
        totals = [x.reward - 0.5 * (x.logps - logps_alone(policy, x, reference=True)).sum() for x in pair]
        assert pair[0].advantages[0] == pytest.approx(totals[0] - totals[1], rel=1e-4)


def test_a_pair_is_the_best_and_the_worst_and_a_tie_has_no_gradient(tiny_base):
    found = rollouts(prompts=2, size=3)
    found = [replace(x, reward=r) for x, r in zip(found, [0.0, math.nan, 1.0, 2.0, 2.0, 2.0], strict=True)]
    first, tie = pairs_of(found)
    assert np.array_equal(first.chosen_ids, found[2].completion_ids)
    assert np.array_equal(first.rejected_ids, found[0].completion_ids)
    policy = helpers.make_policy(tiny_base)
    result = helpers.step(policy, helpers.dpo(1), [tie])
    assert result.loss == pytest.approx(math.log(2)) and result.grad_norm < 1e-6


def test_kept_rollouts_are_the_same_when_they_are_read_again(tiny_base, tmp_path):
    policy, method = helpers.make_policy(tiny_base), grpo()
    found = method.credit(policy, groups_of(on_policy(policy, rollouts())))
    found[0] = replace(found[0], reward=math.nan, values={"own": found[0].advantages})
    found[1:] = [replace(x, values={"own": x.advantages}) for x in found[1:]]
    kept = KeptRollouts(tmp_path)
    for step in (1, 2):
        kept.add(step, found)
    kept.flush()
    again = KeptRollouts(tmp_path).read(2)
    one, other = (step_batches(config_of("grpo"), method, part) for part in (found, again))
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(value, b.tensors()[name]) for name, value in a.tensors().items())
        assert a.facts == pytest.approx(b.facts, nan_ok=True)
    assert math.isnan(again[0].reward) and np.array_equal(again[3].values["own"], found[3].advantages)


def config_of(method, **own):
    from lowlevel.config.file import config_from_tables

    return config_from_tables({"method": method, method: own}, "test")

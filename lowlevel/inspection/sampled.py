"""What an inspection shows of grpo, rloo and ppo: a prompt's completions, their rewards, and each token's push.

The weight of a token, -dL/d(log pi), says where the step pushes it; the value of the loss does not (its mean is 0 while
the policy is the one that sampled).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.batch.replies import lay_out_replies
from lowlevel.config.online import SampledConfig
from lowlevel.data.examples import PreferenceExample
from lowlevel.inspection.displacement import distribution
from lowlevel.inspection.example import WORDS, Example, ScoredBatch, Step, Text, View, example_of
from lowlevel.inspection.reading import formula
from lowlevel.losses.advantages import EPS, deviation, leave_one_out
from lowlevel.losses.policy_gradient import CONSTANT, SEQUENCES, TOKENS
from lowlevel.losses.reward import head_rewards
from lowlevel.methods import GRPO, PPO, RLOO, PolicyGradient
from lowlevel.methods.sampled import sampled_logps, scaled_reference_logps
from lowlevel.model.policy import Policy
from lowlevel.online.rollouts import Rollout


@torch.no_grad()
def inspect_sampled(policy: Policy, method: PolicyGradient, rollouts: Sequence[Rollout]) -> list[Example]:
    """The groups of a step, in the given order."""
    texts, counts, found = dict[int, Text](), dict[int, float](), list[Example]()
    spread = deviation(torch.tensor([[x.reward for x in rollouts]], dtype=torch.float64))
    for batch, (_, inside) in zip(method.micro_batches(rollouts), lay_out_replies(rollouts, method), strict=True):
        scored, weights = _scored(policy, method, batch)
        for i, x in enumerate(inside):
            index = scored.places(i)
            part = float(weights[index].sum()) / (float(weights[batch.belongs].sum()) or 1.0)
            texts[id(x)] = scored.text(i, f"sample {x.sample}", _note(x))
            counts[id(x)] = method.count(batch) * part
    for group in in_groups(rollouts):
        own = [texts[id(x)] for x in group]
        steps, count = _steps(method, group, own, float(spread)), sum(counts[id(x)] for x in group)
        found.append(example_of(group[0], group[0].prompt_ids, own, steps, count=count))
    return found


def in_groups(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """The completions of each prompt, in the order of the step."""
    return [list(group) for _, group in groupby(rollouts, key=attrgetter("group"))]


def _note(x: Rollout) -> str:
    return ", ".join([*([] if x.ended else ["cut at its maximal length"]), *([] if x.counted else ["not in the loss"])])


def _scored(policy: Policy, method: PolicyGradient, batch: PackedBatch) -> tuple[ScoredBatch, Tensor]:
    """A micro-batch with the columns of its tokens, and their weights in the loss, (N,)."""
    moved, temperature = batch.to(policy.placement.device), method.config.temperature
    assert moved.token_values is not None
    kept = method.loss(policy, moved).tokens
    tokens, part = sampled_logps(moved, kept["logps"], kept.get("ref_logps")), moved.token_values[0]
    with torch.enable_grad():
        leaf = tokens.token_logps.clone().requires_grad_()
        losses, metrics = method.token_losses(replace(tokens, token_logps=leaf))
        (slopes,) = torch.autograd.grad(torch.where(moved.belongs, losses * part, 0.0).sum(), leaf)
    clips = [value for name, value in metrics.items() if "clip_ratio" in name]
    columns = {
        "policy": tokens.token_logps,
        "sampler": tokens.old_logps,
        "ratio": (tokens.token_logps - tokens.old_logps).exp(),
        **({"clipped": torch.stack(clips).sum(0) > 0} if clips else {}),
        "weight": -slopes,
        "loss": kept["token_losses"],
    }
    if "kl" in metrics:
        columns["kl"] = metrics["kl"]
    elif method.config.beta > 0 and not isinstance(method, GRPO):
        columns["kl"] = tokens.old_logps - scaled_reference_logps(policy, moved, temperature)
        policy.dropout.disable()
    columns["advantage"] = tokens.advantages
    hidden = policy.scored_hidden_states(moved)
    if isinstance(method, PPO):
        assert policy.value_head is not None
        value, returns = head_rewards(hidden, policy.value_head), moved.token_values[-1]
        of_value = kept["token_losses"] - losses.detach() * part
        columns |= {"value": value, "return": returns, "value loss": of_value}
    predicted = distribution(hidden / temperature, policy.lm_head_weight, moved.scored_targets)
    return ScoredBatch(batch, {name: column.cpu() for name, column in columns.items()}, predicted), part.cpu()


def _steps(method: PolicyGradient, group: Sequence[Rollout], texts: Sequence[Text], spread: float) -> list[Step]:
    """From the rewards to the losses: of each completion of a group (G,), or of the group (1,)."""
    beta, n = method.config.beta, " / n" * (method.spec.average == SEQUENCES)
    rewards = torch.tensor([x.reward for x in group], dtype=torch.float64)
    steps, advantage = [*rewarded(method.config, group), ("reward", "Σ weight · function", rewards)], ""
    if isinstance(method, GRPO):
        scale, own = method.config.scale_rewards, float(deviation(rewards[None]))
        steps += [("group mean", "of the rewards", rewards.nanmean()[None])]
        if scale != "none":
            steps += [("deviation", f"of the {scale}'s rewards", torch.tensor([own if scale == "group" else spread]))]
        advantage = (
            "A = reward − group mean" if scale == "none" else f"A = (reward − group mean) / (deviation + {EPS:g})"
        )
    if isinstance(method, RLOO):
        penalised = rewards - torch.tensor([beta * float(one.columns["kl"].sum()) if beta else 0.0 for one in texts])
        others = penalised - leave_one_out(penalised[None])[0]
        steps += [("R", f"reward − β Σ kl, β = {beta:g}", penalised), ("mean of others", "of the group's R", others)]
        advantage = "A = R − mean of others"
    if isinstance(method, PPO):
        white = ", whitened over the step" * method.config.whiten_advantages
        advantage = f"A by GAE from −β kl, V, and the reward at the last token{white}; mean of tokens"
    words = {
        "advantage": advantage,
        "ratio": "r = π / sampler, mean of tokens",
        "clipped": "share of tokens",
        "kl": "mean of tokens",
        "value loss": "Σ of the tokens, in the loss",
        "loss": f"Σ ℓ{n} of the tokens",
    }
    for name, word in words.items():
        if name in texts[0].columns:
            values = torch.stack([one.columns[name].double().sum() for one in texts])
            lengths = torch.tensor([len(one.scored) for one in texts])
            steps.append((name, word, values if "loss" in name else values / lengths))
    return [*steps, ("loss of the group", "Σ loss", steps[-1][2].sum()[None])]


def rewarded(config: SampledConfig, group: Sequence[Rollout]) -> list[Step]:
    """The rewards of a group's completions by function, (G,)."""
    weights = config.reward_weights or (1.0,) * len(group[0].rewards)
    named = zip(group[0].rewards, weights, strict=True)
    return [(f"reward/{name}", f"function, weight {weight:g}", torch.tensor([x.rewards[name] for x in group]))
            for name, weight in named]  # fmt: skip


TOGETHER = {"sequence": "geometric mean", "sequence_sum": "product"}  # of the ratios of a completion
MEAN_OF = {
    SEQUENCES: "mean over completions of Σ ℓ / n",
    TOKENS: "mean over tokens of ℓ",
    CONSTANT: "Σ ℓ / (completions × max_completion_length)",
}


def view(method: PolicyGradient) -> View:
    """How an inspection of grpo, rloo or ppo names its columns and steps."""
    level = TOGETHER.get(str(method.settings.get("importance_sampling_level")))
    terms, clip = "", f": it looks at the {level} of the completion's ratios" if level else ""
    if isinstance(method, GRPO) and method.adds_kl:
        terms = f" + {method.config.beta:g} kl"
    if isinstance(method, PPO):
        terms = " + value loss"
    of_token = formula(method.spec)
    if not method.spec.own:
        of_token = of_token.rpartition(", ")[0]  # without the average
    warm = "" if method.config.temperature == 1 else f", at temperature {method.config.temperature:g}"
    penalty = method.config.kl_estimator if isinstance(method, GRPO) else "log sampler − log reference"
    return View(
        unit="completion",
        tokens="token",
        formula=f"{MEAN_OF[method.spec.average]}, ℓ = {of_token}{terms}",
        words={
            "policy": f"log-probability of the token under the policy now{warm}",
            "sampler": "the same when the completion was sampled",
            "ratio": "r = π / sampler: 1 while the policy is the one that sampled",
            "clipped": f"the clip removes the token's gradient{clip}",
            "weight": "−dL/d(log π), before the mean: above 0, the step makes the token likelier",
            "loss": "of the token, with its weight in the sum",
            "kl": f"divergence from the reference ({penalty}), {'in the loss' if 'kl' in terms else 'in the reward'}",
            "advantage": "A: how much better than expected",
            "value": "V, of the value head before the token",
            "return": "A + V at sampling: what V is trained towards",
            "value loss": "vf_coef · half the squared error of V, clipped, with its weight in the sum",
            **WORDS,
        },
        adds="loss",
        sums="loss",
        facts=("reward", "advantage", "tokens", "ratio", "clipped", "loss"),
        measure="advantage",
        caption="Advantages of {} completions, one square each. Blue: the step makes the completion likelier; orange: "
        "less likely.",
        colours=("weight", "ratio", "kl", "advantage"),
        by_text=True,
        symbols="π: policy; A: advantage; r: ratio; ε, ε₊: clip ranges; n: tokens; ℓ: loss of a token",
    )


def with_groups(
    examples: Sequence[Example], pairs: Sequence[PreferenceExample], rollouts: Sequence[Rollout], config: SampledConfig
) -> list[Example]:
    """Pairs of online_dpo with the scores of their completions, and the others of their groups."""
    found = []
    for example, pair, group in zip(examples, pairs, in_groups(rollouts), strict=True):
        score = "Σ weight · function: highest and lowest"  # "reward" is that of dpo
        steps = [*rewarded(config, group), ("score", score, torch.tensor([x.reward for x in group]))]
        start, none = len(pair.prompt_ids), torch.zeros(0, dtype=torch.int64)
        every = [
            Text(f"sample {x.sample}", _note(x), torch.as_tensor(x.completion_ids), none, start, {}, {}) for x in group
        ]
        judged = example_of(group[0], pair.prompt_ids, every, steps)
        texts, used = [], [pair.chosen_ids, pair.rejected_ids]
        for text, ids in zip(example.texts, used, strict=True):
            i = next(i for i, x in enumerate(group) if x.completion_ids is ids)
            same = "all scores are equal, so nothing is preferred" * (used[0] is used[1])
            notes, own = (judged.texts[i].name, _note(group[i]), same), {**judged.texts[i].numbers, **text.numbers}
            columns = {**text.columns, "sampler": torch.from_numpy(group[i].logps)}
            texts.append(replace(text, note=", ".join(filter(None, notes)), columns=columns, numbers=own))
        others = [
            one for one, x in zip(judged.texts, group, strict=True) if not any(x.completion_ids is ids for ids in used)
        ]
        formulas = {**judged.equation, **example.equation}
        found.append(replace(example, texts=tuple(texts), others=tuple(others), equation=formulas))
    return found

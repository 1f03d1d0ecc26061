"""Proximal policy optimisation (arXiv 1707.06347) with a value head on the policy's hidden states.

V_t = w . h_t                        h_t: hidden state before token t, the one that predicts it; w starts at 0
r_t = -beta (log pi(y_t) - log ref(y_t)), and the completion's reward at its last token, whatever token that is
A_t, R_t: generalised advantage estimation and A + V, both from the values at sampling
L   = mean_t -min(r A, clip(r) A) + vf_coef max((V - R)^2, (V_c - R)^2) / 2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.config.online import PPOConfig
from lowlevel.losses import LossSums
from lowlevel.losses.advantages import gae, whiten
from lowlevel.losses.policy_gradient import clipped_value_loss
from lowlevel.losses.reward import head_rewards
from lowlevel.methods.sampled import (
    GIVEN,
    SampledMethod,
    by_completion,
    policy_gradient_sums,
    sampled_logps,
    scaled_reference_logps,
)
from lowlevel.model.policy import Policy
from lowlevel.online.rollouts import Rollout
from lowlevel.ranks import ALONE, Ranks


@dataclass(frozen=True)
class PPO(SampledMethod):
    """The PPO method. A value head predicts the return at each token."""

    config: PPOConfig
    name: ClassVar[str] = "ppo"
    values: ClassVar[tuple[str, ...]] = ("values", "returns")  # of each token, at sampling

    def loss(self, policy: Policy, batch: PackedBatch) -> LossSums:
        """The weighted sum of the tokens' losses, of policy and value head."""
        assert policy.value_head is not None and batch.token_values is not None
        policy.dropout.disable()  # the sampler has none
        hidden = policy.scored_hidden_states(batch)
        logps = policy.scores(hidden / self.config.temperature, batch.scored_targets)[0]
        tokens, values = sampled_logps(batch, logps, None), head_rewards(hidden, policy.value_head)
        losses, metrics = self.token_losses(tokens)
        old_values, returns = batch.token_values[len(GIVEN) :]
        value_losses = clipped_value_loss(values, old_values, returns, cliprange=self.config.cliprange_value)
        metrics = {**metrics, "loss/policy": losses.detach(), "loss/value": value_losses.detach(), "returns": returns}
        total = losses + self.config.vf_coef * value_losses
        return policy_gradient_sums(batch, tokens, total, {**metrics, "values": values.detach()})

    @property
    def settings(self) -> Mapping[str, object]:
        """The clip range has a name of its own here."""
        return {**super().settings, **({} if self.spec.own else {"epsilon": self.config.cliprange})}

    def credit(self, policy: Policy, groups: Sequence[Sequence[Rollout]], ranks: Ranks = ALONE) -> list[Rollout]:
        """The completions of one step with values, returns and advantages of their tokens."""
        every, own = [x for group in groups for x in group], self.config
        policy.dropout.disable()
        values = by_completion(policy, every, self, _values, ranks)
        references: Sequence[np.ndarray] = [x.logps for x in every]
        if own.beta > 0:
            references = by_completion(policy, every, self, scaled_reference_logps, ranks)
        found = []
        for x, value, ref in zip(every, values, references, strict=True):
            rewards = -own.beta * torch.from_numpy(x.logps - ref).double()
            rewards[-1] += x.reward
            advantages, returns = gae(rewards, torch.from_numpy(value).double(), gamma=own.gamma, lam=own.lam)
            counted = bool(np.isfinite(x.reward)) and (x.ended or not own.mask_truncated_completions)
            kept = {"values": value, "returns": returns.float().numpy() if counted else value}
            advantages = advantages if counted else torch.zeros_like(advantages)
            found.append(replace(x, advantages=advantages.float().numpy(), values=kept, counted=counted))
        return _whitened(found) if own.whiten_advantages else found


def _values(policy: Policy, batch: PackedBatch, temperature: float) -> Tensor:
    """The value of the state before each scored token, (N,) fp32, at any temperature."""
    assert policy.value_head is not None
    return head_rewards(policy.scored_hidden_states(batch), policy.value_head)


def _whitened(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The same with advantages of mean 0 and deviation 1 over all tokens that count."""
    counted = [torch.from_numpy(x.advantages).double() for x in rollouts if x.counted]
    if not counted:
        return list(rollouts)
    white = iter(whiten(torch.cat(counted)).float().split([len(part) for part in counted]))
    return [replace(x, advantages=next(white).numpy()) if x.counted else x for x in rollouts]

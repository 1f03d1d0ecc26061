"""Group-relative policy optimisation (arXiv 2402.03300) and its family; the losses are in losses/policy_gradient.py.

A step samples G completions of each of its prompts, rewards them, and compares each with its group:

    A_i = r_i - mean(r_1 ... r_G)        L = sum_t w_t [ -min(r_t A_i, clip(r_t) A_i) + beta kl_t ] / count
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowlevel.config.online import GRPOConfig
from lowlevel.losses import SampledLogps
from lowlevel.losses.advantages import group_relative
from lowlevel.losses.policy_gradient import kl_penalty
from lowlevel.methods.sampled import SampledMethod, with_advantages
from lowlevel.model.policy import Policy
from lowlevel.online.rollouts import Rollout
from lowlevel.ranks import ALONE, Ranks


@dataclass(frozen=True)
class GRPO(SampledMethod):
    """The GRPO method: a group's rewards give the advantages of its completions."""

    config: GRPOConfig
    name: ClassVar[str] = "grpo"

    def token_losses(self, tokens: SampledLogps) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of each token, (N,), before its weight, and metrics, (N,) each."""
        losses, metrics = super().token_losses(tokens)
        if not self.adds_kl:
            return losses, metrics
        penalty = kl_penalty(tokens, self.config.kl_estimator)
        return losses + self.config.beta * penalty, {**metrics, "kl": penalty.detach()}

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return self.config.beta > 0

    @property
    def adds_kl(self) -> bool:
        """Whether beta times the KL term is added to the loss: a custom one that reads beta has its own."""
        return self.has_reference and "beta" not in self.spec.parameters

    def credit(self, policy: Policy, groups: Sequence[Sequence[Rollout]], ranks: Ranks = ALONE) -> list[Rollout]:
        """The completions of one step with their advantages."""
        rewards = torch.tensor([[x.reward for x in group] for group in groups], dtype=torch.float64)
        advantages = group_relative(rewards, scale_rewards=self.config.scale_rewards)
        return with_advantages(groups, advantages, masked=self.config.mask_truncated_completions)

"""REINFORCE with the other completions of a prompt as baseline (RLOO, arXiv 2402.14740).

    R_i = r_i - beta sum_t (log pi(y_t) - log ref(y_t))        A_i = R_i - mean of the other R
    L   = mean_i -min(rho_i A_i, clip(rho_i) A_i)              rho_i = pi(y_i) / old(y_i), of the whole completion

The KL divergence is in the reward, where its simplest estimate k1 has the right gradient (`kl_penalty`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lowlevel.config.online import RLOOConfig
from lowlevel.losses.advantages import leave_one_out
from lowlevel.methods.sampled import SampledMethod, by_completion, scaled_reference_logps, with_advantages
from lowlevel.model.policy import Policy
from lowlevel.online.rollouts import Rollout
from lowlevel.ranks import ALONE, Ranks


@dataclass(frozen=True)
class RLOO(SampledMethod):
    """The RLOO method: a completion is compared with the mean of the others of its group."""

    config: RLOOConfig
    name: ClassVar[str] = "rloo"

    @property
    def settings(self) -> Mapping[str, object]:
        """The ratio of the built-in loss is that of the whole completion."""
        return {**super().settings, **({} if self.spec.own else {"importance_sampling_level": "sequence_sum"})}

    def credit(self, policy: Policy, groups: Sequence[Sequence[Rollout]], ranks: Ranks = ALONE) -> list[Rollout]:
        """The completions of one step with their advantages."""
        rewards = torch.tensor([[x.reward for x in group] for group in groups], dtype=torch.float64)
        if self.config.beta > 0:
            every = [x for group in groups for x in group]
            references = by_completion(policy, every, self, scaled_reference_logps, ranks)
            kl = [float((x.logps - ref).sum()) for x, ref in zip(every, references, strict=True)]
            rewards -= self.config.beta * torch.tensor(kl, dtype=torch.float64).view_as(rewards)
        masked = self.config.mask_truncated_completions
        return with_advantages(groups, leave_one_out(rewards), masked=masked)

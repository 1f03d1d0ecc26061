"""Whether a run reads a reference, and TR-DPO (arXiv 2404.09656): one that follows the policy.

    after every N steps:    reference <- alpha * policy + (1 - alpha) * reference

The paper does this with all weights of a model. Here only an adapter is trained, so the reference is a second adapter
of the same shape over the same base and frozen adapter. It starts with B = 0, which is the reference of plain DPO. A
and B are mixed each by itself: a mixture of the products B A would have a higher rank. With alpha = 1, the paper's hard
update, both are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowlevel.config.schema import RunConfig
from lowlevel.losses import loss_spec

DEFAULT_ALPHA = 0.6  # as in the paper's soft update, and in TRL


def reads_reference(config: RunConfig) -> bool:
    """Whether a run compares the policy with a reference."""
    free = config.method == "dpo" and loss_spec(config.dpo.loss_type).reference_free
    return config.has_reference and not free


@dataclass(frozen=True)
class Following:
    """How a reference follows: every so many steps, with which share of the policy."""

    steps: int
    alpha: float

    @classmethod
    def of(cls, config: RunConfig) -> Following | None:
        """The one that [dpo] configures; None for a reference that stays."""
        dpo = config.dpo
        if config.method != "dpo" or dpo.ref_model_sync_steps is None:
            return None
        return cls(dpo.ref_model_sync_steps, dpo.ref_model_mixup_alpha or DEFAULT_ALPHA)

    def __str__(self) -> str:
        what = f"{self.alpha:g} policy + {1 - self.alpha:g} reference" if self.alpha < 1 else "the policy"
        return f"after every {self.steps} steps it becomes {what}"


@dataclass(frozen=True)
class MovingReference:
    """The reference's adapter in one buffer, in the order of the policy's flat weights."""

    weights: Tensor  # (n,) fp32; its address stays, because captured CUDA graphs read it there
    following: Following

    @torch.no_grad()
    def follow(self, policy: Tensor, step: int) -> None:
        """Move towards the policy's weights (n,) if `step`, the number of applied updates, is due."""
        if step % self.following.steps == 0:
            self.weights.lerp_(policy, self.following.alpha)

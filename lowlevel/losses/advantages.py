"""Advantages of sampled completions: from rewards to what each token's log-probability is multiplied by.

float64, on the host. A reward that is NaN is missing (its reward function failed): it takes no part in the mean or the
deviation of its group, and its advantage is NaN; the caller takes the completion out of the loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["none", "group", "batch"]
EPS = 1e-4  # added to a deviation of rewards, as in TRL; verl adds 1e-6


def group_relative(rewards: Tensor, *, scale_rewards: Scale = "none", eps: float = EPS) -> Tensor:
    """A_i = r_i - mean(r) of the G completions of a prompt, (P, G) -> (P, G). GRPO, arXiv 2402.03300.

    Args:
        rewards: of P prompts with G completions each.
        scale_rewards: "group": divided by std(r) + eps of the group, as in GRPO; "batch": of all P x G rewards; "none":
            not divided (Dr. GRPO, arXiv 2503.20783: the division gives prompts that are almost always, or almost never,
            solved a larger weight). The deviation is that of a sample, with G - 1.
        eps: added to the deviation.
    """
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    if scale_rewards == "none":
        return centred
    return centred / (deviation(rewards if scale_rewards == "group" else rewards.reshape(1, -1)) + eps)


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean of the other rewards of its prompt, (P, G) -> (P, G). RLOO, arXiv 2402.14740.

    It is G / (G - 1) times the group-relative advantage. A completion without others has 0.
    """
    count = rewards.isfinite().sum(dim=1, keepdim=True)
    return group_relative(rewards) * count / (count - 1).clamp(min=1)


def gae(rewards: Tensor, values: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation of one completion of T tokens (arXiv 1506.02438), and the returns A + V.

        d_t = r_t + gamma V_{t+1} - V_t, V_{T+1} = 0        A_t = d_t + gamma lam A_{t+1}

    Args:
        rewards: (T,), of each token; that of the completion is at its last one.
        values: (T,), V of the state before each token.
    """
    advantages, following = torch.zeros_like(values), 0.0
    errors = rewards + gamma * torch.cat([values[1:], values.new_zeros(1)]) - values
    for t in reversed(range(len(errors))):
        following = float(errors[t]) + gamma * lam * following
        advantages[t] = following
    return advantages, advantages + values


def whiten(advantages: Tensor, eps: float = 1e-8) -> Tensor:
    """(A - mean) / (std + eps) over all tokens of a step, (N,); the returns are computed before."""
    return (advantages - advantages.mean()) / (deviation(advantages[None])[0] + eps)


def deviation(values: Tensor) -> Tensor:
    """Standard deviation of a sample by row, without NaN, (P, G) -> (P, 1); 0 for fewer than two values."""
    squares = (values - values.nanmean(dim=1, keepdim=True)).square().nansum(dim=1, keepdim=True)
    return (squares / (values.isfinite().sum(dim=1, keepdim=True) - 1).clamp(min=1)).sqrt()

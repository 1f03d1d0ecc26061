"""The value function of PPO: a scalar head that predicts, before each token, the reward still to come."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange: float = 0.2) -> Tensor:
    """`max((V - R)^2, (V_c - R)^2) / 2` of each token, V_c = V kept within `cliprange` of the old value; (N,).

    R are the returns, advantage + old value. arXiv 1707.06347's implementation in OpenAI's baselines.
    """
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())

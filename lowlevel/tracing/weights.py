"""The weights of a pair: how much of each completion's gradient the loss asks for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lowlevel.config import DPOConfig
from lowlevel.dpo import loss_arguments
from lowlevel.losses import dpo_loss


def pair_weights(
    config: DPOConfig, logps: Mapping[str, Tensor], chosen_lengths: Tensor, rejected_lengths: Tensor
) -> dict[str, np.ndarray]:
    """-dL/d(chosen reward) and dL/d(rejected reward), each (P,) fp32; both are sigma(-margin) for the sigmoid loss.

    Args:
        config: the loss and beta; a reward is beta times a log-ratio.
        logps: (P,) fp32 by column name, of one micro-batch: `aot` sorts its pairs.
        chosen_lengths: (P,) int64.
        rejected_lengths: (P,) int64.
    """
    chosen, rejected = (logps[name].clone().requires_grad_() for name in ("chosen_logps", "rejected_logps"))
    with torch.enable_grad():
        output = dpo_loss(
            chosen,
            rejected,
            logps["ref_chosen_logps"],
            logps["ref_rejected_logps"],
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            **loss_arguments(config),
        )
        for_chosen, for_rejected = torch.autograd.grad(output.losses.sum(), (chosen, rejected))
    return {
        "weight": (-for_chosen / config.beta).numpy(),
        "rejected_weight": (for_rejected / config.beta).numpy(),
    }

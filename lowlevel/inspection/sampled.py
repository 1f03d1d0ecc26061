"""The records of an inspected step on sampled completions: each token's ratio, clip, KL and loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowlevel.inspection.displacement import distribution
from lowlevel.inspection.records import TokenRecord, places_of, tokens_at
from lowlevel.methods import PolicyGradient
from lowlevel.methods.sampled import lay_out, sampled_logps
from lowlevel.model.policy import Policy
from lowlevel.online.rollouts import Rollout


@dataclass(frozen=True, repr=False)
class SampledRecord:
    """A completion of n tokens, under the policy that sampled it and under the inspected one."""

    rollout: Rollout  # prompt, rewards, advantages
    tokens: TokenRecord  # under the inspected policy, at the temperature of sampling
    old_logps: Tensor  # (n,) fp32, by the sampler
    ref_logps: Tensor | None  # (n,) fp32
    clipped: Tensor  # (n,) bool: the clip removes the token's gradient
    kl: Tensor | None  # (n,) fp32, of beta's term
    token_losses: Tensor  # (n,) fp32, with the weight of the aggregation
    count: float  # what the completion adds to the count that the step's loss is divided by

    def __repr__(self) -> str:
        x = self.rollout
        return f"SampledRecord(row {x.row}, sample {x.sample}: reward {x.reward:g}, loss {float(self.loss):+.4f})"

    @property
    def loss(self) -> Tensor:
        """Sum over the tokens, () fp32."""
        return self.token_losses.sum()

    @property
    def ratios(self) -> Tensor:
        """pi / old of each token, (n,) fp32."""
        return (self.tokens.logps - self.old_logps).exp()


@torch.no_grad()
def inspect_sampled(policy: Policy, method: PolicyGradient, rollouts: Sequence[Rollout]) -> list[SampledRecord]:
    """The completions of a step, in the given order."""
    found: dict[int, SampledRecord] = {}
    made = zip(method.micro_batches(rollouts), lay_out(rollouts, method), strict=True)
    for batch, (_, inside) in made:
        moved = batch.to(policy.placement.device)
        sums = method.loss(policy, moved)
        tokens = sampled_logps(moved, sums.tokens["logps"], sums.tokens.get("ref_logps"))
        metrics = {name: value.cpu() for name, value in method.token_losses(tokens)[1].items()}
        clips = [value for name, value in metrics.items() if "clip_ratio" in name]
        clipped = torch.stack(clips).sum(0) > 0 if clips else torch.zeros(len(batch.sequence_ids), dtype=torch.bool)
        hidden = policy.scored_hidden_states(moved) / method.config.temperature
        predicted = distribution(hidden, policy.lm_head_weight, moved.scored_targets)
        kept = {name: value.cpu() for name, value in sums.tokens.items()}
        weights = batch.token_values[0] if batch.token_values is not None else kept["logps"]
        for number, x in enumerate(inside):
            index = places_of(batch, number)
            count = method.count(batch) * float(weights[index].sum()) / (float(weights[batch.belongs].sum()) or 1.0)
            found[id(x)] = SampledRecord(
                rollout=x,
                tokens=tokens_at(batch, index, kept["logps"], predicted),
                old_logps=kept["old_logps"][index],
                ref_logps=kept["ref_logps"][index] if "ref_logps" in kept else None,
                clipped=clipped[index],
                kl=metrics["kl"][index] if "kl" in metrics else None,
                token_losses=kept["token_losses"][index],
                count=count,
            )
    return [found[id(x)] for x in rollouts]

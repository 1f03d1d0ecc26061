"""What the methods on sampled completions share: their micro-batches, and the sums of a policy-gradient loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.batch.packing import Layout
from lowlevel.batch.replies import lay_out_replies
from lowlevel.config.online import GRPOConfig, SampledConfig
from lowlevel.losses import POLICY_LOSSES, LossSums, SampledLogps
from lowlevel.losses.policy_gradient import aggregation
from lowlevel.losses.registry import LossSpec, check_result, find
from lowlevel.model.policy import Policy
from lowlevel.online.rollouts import Rollout
from lowlevel.ranks import Ranks

# What a batch holds of each token: its weight in the loss, that in means over tokens, and what the rollout gives.
GIVEN = ("weight", "share", "old_logps", "advantages")
DIFFERENCE = "sampling/sampling_logp_difference"
CLIPPING = ("epsilon", "epsilon_high", "delta", "importance_sampling_level", "cliprange")  # keys of built-in losses


@dataclass(frozen=True)
class SampledMethod(Layout):
    """What GRPO, RLOO and PPO have in common. Examples are completions that the policy sampled, with their rewards."""

    config: SampledConfig
    unit: ClassVar[str] = "completions"
    statistics: ClassVar[tuple[str, ...]] = ()
    values: ClassVar[tuple[str, ...]] = ()  # of Rollout.values that the loss reads

    @cached_property
    def spec(self) -> LossSpec:
        """The loss of `loss_type`, which says how tokens are averaged. Raises ValueError for an unknown one."""
        return find(self.config.loss_type, {name: POLICY_LOSSES[name] for name in self.config.losses})

    @property
    def settings(self) -> Mapping[str, object]:
        """The hyper-parameters that were given to it; the others are its own defaults."""
        own = self.config
        keys = {name: getattr(own, name) for name in self.spec.parameters if name in type(own).model_fields}
        return {name: value for name, value in {**keys, **own.loss_kwargs}.items() if value is not None}

    @property
    def has_reference(self) -> bool:
        """Whether the loss, and not only the reward, compares the policy with a reference."""
        return False

    def loss(self, policy: Policy, batch: PackedBatch) -> LossSums:
        """The sum of the tokens' losses, each by its weight."""
        temperature = self.config.temperature
        ref_logps = scaled_reference_logps(policy, batch, temperature) if self.has_reference else None
        policy.dropout.disable()  # the sampler has none
        tokens = sampled_logps(batch, scaled_logps(policy, batch, temperature), ref_logps)
        return policy_gradient_sums(batch, tokens, *self.token_losses(tokens))

    def token_losses(self, tokens: SampledLogps) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of each token, (N,), before its weight, and metrics, (N,) each."""
        return self.spec(tokens, self.settings)

    def count(self, batch: PackedBatch) -> float:
        """Completions, tokens, or completions times the maximal length: see `aggregation`."""
        assert batch.total_weight is not None
        return batch.total_weight

    def micro_batches(self, examples: Sequence[Rollout]) -> list[PackedBatch]:
        """The completions of one step in rows, with weights and counts over all of them."""
        counted = [x for x in examples if x.counted]
        longest = self.config.max_completion_length
        parts = {id(x): aggregation(self.spec.average, len(x.completion_ids), longest) for x in counted}
        count, tokens = sum(c for _, c in parts.values()), sum(len(x.completion_ids) for x in counted)
        share = count / tokens if tokens else 0.0
        made = []
        for batch, inside in lay_out_replies(examples, self):
            values = np.zeros((len(GIVEN) + len(self.values), len(batch.sequence_ids)), np.float32)
            for number, x in enumerate(inside):
                places = batch.sequence_index[number, : len(x.completion_ids)].numpy()
                weight = parts[id(x)][0] if x.counted else 0.0
                own = [x.logps, x.advantages, *(x.values[name] for name in self.values)]
                values[0, places], values[1, places] = weight, share * x.counted
                values[2:, places] = np.stack(own)
            total = sum(parts[id(x)][1] for x in inside if x.counted)
            made.append(replace(batch, token_values=torch.from_numpy(values), total_weight=total))
        if not counted:  # the step has no loss: its gradient is 0, divided by 1
            made[0] = replace(made[0], total_weight=1.0)
        return made


Score = Callable[[Policy, PackedBatch, float], Tensor]  # of each scored token at a temperature, (N,)


@torch.no_grad()
def by_completion(
    policy: Policy, rollouts: Sequence[Rollout], method: SampledMethod, score: Score, ranks: Ranks
) -> list[np.ndarray]:
    """What a pass without gradient gives for each token, an array (n,) fp32 for each completion.

    `ranks` share the micro-batches; each gets all results.
    """
    found, made = dict[int, np.ndarray](), lay_out_replies(rollouts, method)
    sizes = [len(batch.scored_targets) for batch, _ in made]
    every = torch.zeros(sum(sizes))
    parts = every.split(sizes)
    for number in ranks.deal([batch for batch, _ in made]).numbers:
        batch = made[number][0].to(policy.placement.device)
        parts[number].copy_(score(policy, batch, method.config.temperature))
    ranks.sum_(every)
    for (batch, inside), values in zip(made, parts, strict=True):
        for number, x in enumerate(inside):
            found[id(x)] = values.numpy()[batch.sequence_index[number, : len(x.completion_ids)].numpy()]
    return [found[id(x)] for x in rollouts]


def sampled_logps(batch: PackedBatch, token_logps: Tensor, ref_token_logps: Tensor | None) -> SampledLogps:
    """The input of a policy-gradient loss."""
    assert batch.token_values is not None
    _, _, old_logps, advantages, *_ = batch.token_values
    ids, index = batch.sequence_ids, batch.sequence_index
    return SampledLogps(token_logps, old_logps, advantages, ref_token_logps, ids, index, batch.lengths)


def scaled_logps(policy: Policy, batch: PackedBatch, temperature: float) -> Tensor:
    """Log-probabilities of the scored tokens under softmax(logits / temperature), (N,) fp32, as they were sampled."""
    return policy.scores(policy.scored_hidden_states(batch) / temperature, batch.scored_targets)[0]


def scaled_reference_logps(policy: Policy, batch: PackedBatch, temperature: float) -> Tensor:
    """The same under the reference: no dropout, no gradient."""
    with policy.reference():
        return scaled_logps(policy, batch, temperature)


def policy_gradient_sums(
    batch: PackedBatch, tokens: SampledLogps, losses: Tensor, metrics: Mapping[str, Tensor]
) -> LossSums:
    """Weighted sums of the token losses (N,), means over tokens of the metrics, and how far sampler and trainer are
    apart: at the first step on a batch its policy is the sampler's, and the difference is rounding.
    """
    assert batch.token_values is not None
    weight, share = batch.token_values[:2]
    apart = (tokens.token_logps.detach() - tokens.old_logps).abs() * (share > 0)
    ratio = (tokens.token_logps.detach() - tokens.old_logps).exp()
    named = {**metrics, f"{DIFFERENCE}/mean": apart, "ratio": ratio}
    loss = torch.where(batch.belongs, losses * weight, 0.0)
    by_token = {"logps": tokens.token_logps, "old_logps": tokens.old_logps, "token_losses": loss}
    by_token |= {} if tokens.ref_token_logps is None else {"ref_logps": tokens.ref_token_logps}
    logps = batch.sequence_sums(tokens.token_logps.detach())
    return LossSums(
        loss.sum(),
        {name: torch.where(batch.belongs, value * share, 0.0).sum() for name, value in named.items()}
        | {f"{DIFFERENCE}/max": apart.max()},
        examples={
            "logps": logps,
            "old_logps": batch.sequence_sums(tokens.old_logps),
            "advantage": batch.sequence_sums(tokens.advantages) / batch.lengths,
            "loss": batch.sequence_sums(loss.detach()),
        },
        tokens={name: value.detach() for name, value in by_token.items()},
    )


def check_loss(method: SampledMethod) -> None:
    """Raise ValueError for an unknown loss, for a setting that it does not read, and for a custom loss that fails on a
    trial batch; needs no model.
    """
    spec, config, fields = method.spec, method.config, type(method.config).model_fields
    if keys := sorted(fields.keys() & config.loss_kwargs.keys()):
        raise ValueError(f"loss_type {spec.name!r}: {keys[0]} is a key of its own: not in loss_kwargs")
    keys = [key for key in CLIPPING if key in fields and spec.own]
    changed = {key: getattr(config, key) for key in keys if getattr(config, key) != fields[key].default}
    for name, value in {**changed, **config.loss_kwargs}.items():
        if name not in spec.parameters:
            raise ValueError(f"loss_type {spec.name!r} does not use {name} (got {value})")
    if spec.own:  # completions of 1 and 3 tokens, a dummy one, and dummy tokens
        ids, index = torch.tensor([3, 0, 3, 1, 1, 1]), torch.tensor([[1, 6, 6], [3, 4, 5], [6, 6, 6]])
        logps = torch.linspace(-0.5, -2.0, 6, requires_grad=True)
        old, advantages = torch.tensor([[0.0, -1.0, 0.0, -1.0, -2.0, -0.5], [0.0, 1.0, 0.0, -1.0, -1.0, -1.0]])
        reference = old if isinstance(config, GRPOConfig) and config.beta > 0 else None
        given = SampledLogps(logps, old, advantages, reference, ids, index, torch.tensor([1, 3, 0]))
        check_result(spec, given, method.settings, logps, size=6)


def with_advantages(groups: Sequence[Sequence[Rollout]], advantages: Tensor, *, masked: bool) -> list[Rollout]:
    """The completions with the advantage (P, G) of each at all its tokens.

    Without a reward, or with `masked` without an end, a completion does not count.
    """
    found = []
    for group, row in zip(groups, advantages.tolist(), strict=True):
        for x, advantage in zip(group, row, strict=True):
            counted = bool(np.isfinite(advantage)) and (x.ended or not masked)
            every = np.full(len(x.completion_ids), advantage if counted else 0.0, np.float32)
            found.append(replace(x, advantages=every, counted=counted))
    return found

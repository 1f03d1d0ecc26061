"""Policy-gradient losses of sampled completions: GRPO and its family, RLOO and PPO. One value a token, (N,).

    r_t = pi(y_t | y_<t) / old(y_t | y_<t)       old: the policy that sampled y
    L   = sum_t w_t loss_t / count               w_t and count: `aggregation`, counted over the whole optimizer step

Where the policy is still the one that sampled, every r_t is 1 and the value of a loss says nothing about learning; its
gradient does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from lowlevel.losses.registry import AVERAGES, BUILT_IN, LossSpec, spec_of

Level = Literal["token", "sequence", "sequence_sum"]
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class SampledLogps:
    """Log-probabilities of the N tokens of S sampled completions.

    Attributes:
        token_logps: (N,) fp32, under the policy.
        old_logps: (N,), under the policy that sampled.
        advantages: (N,); all tokens of a completion have the same, except in PPO.
        ref_token_logps: (N,), under the reference; None unless grpo has beta above 0.
        sequence_ids: (N,) int64, the completion of each token; S marks a dummy token, which no sum contains.
        sequence_index: (S, L) int64, the tokens of each completion; N marks padding.
        lengths: (S,) tokens of each completion.
    """

    token_logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    ref_token_logps: Tensor | None
    sequence_ids: Tensor
    sequence_index: Tensor
    lengths: Tensor

    def sums(self, values: Tensor) -> Tensor:
        """By completion, (N,) -> (S,)."""
        return _padded(values)[self.sequence_index].sum(-1)

    def spread(self, values: Tensor) -> Tensor:
        """A completion's value at each of its tokens, (S,) -> (N,); 0 at dummies."""
        return _padded(values)[self.sequence_ids]


def _padded(values: Tensor) -> Tensor:
    return torch.cat([values, values.new_zeros(1)])


def ratios(tokens: SampledLogps, level: Level = "token") -> Tensor:
    """pi / old at each token, (N,).

    token: r_t. sequence: the geometric mean of a completion's r_t (GSPO, arXiv 2507.18071), whose gradient goes to all
    its tokens. sequence_sum: their product, the ratio of the whole completion (RLOO).
    """
    logratios = tokens.token_logps - tokens.old_logps
    if level == "token":
        return logratios.exp()
    sums = tokens.sums(logratios)
    return tokens.spread(sums if level == "sequence_sum" else sums / tokens.lengths).exp()


def clipped_surrogate(
    tokens: SampledLogps,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: Level = "token",
) -> tuple[Tensor, Metrics]:
    """`-min(r A, clip(r, 1 - eps, 1 + eps_high) A)`. PPO, arXiv 1707.06347.

    `epsilon_high` is `epsilon` unless given (0.28 in DAPO, arXiv 2503.14476). `delta`: r is at most this in the first
    term, which bounds the loss for A < 0 (dual clip, arXiv 1912.09729). Where the clipped term is smaller, the gradient
    is 0.
    """
    r, high = ratios(tokens, importance_sampling_level), epsilon if epsilon_high is None else epsilon_high
    free = r if delta is None else r.clamp(max=delta)
    losses = -torch.minimum(free * tokens.advantages, r.clamp(1 - epsilon, 1 + high) * tokens.advantages)
    low = (r < 1 - epsilon) & (tokens.advantages < 0)
    above = (r > 1 + high) & (tokens.advantages > 0)
    return losses, {"clip_ratio/low_mean": low.float(), "clip_ratio/high_mean": above.float()}


def cispo(tokens: SampledLogps, *, epsilon_high: float | None = 5.0) -> tuple[Tensor, Metrics]:
    """`-sg(min(r, eps_high)) A log pi`. CISPO, arXiv 2506.13585: clipping bounds a weight and drops no gradient."""
    r, high = ratios(tokens).detach(), 5.0 if epsilon_high is None else epsilon_high
    above = ((r > high) & (tokens.advantages > 0)).float()
    return -r.clamp(max=high) * tokens.advantages * tokens.token_logps, {"cispo_clip_ratio": above}


def sapo(
    tokens: SampledLogps, *, sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05
) -> tuple[Tensor, Metrics]:
    """`-4/T s(T (r - 1)) A`, T by the sign of A. SAPO, arXiv 2511.20347: a soft clip with slope 1 at r = 1."""
    r = ratios(tokens)
    positive = (tokens.advantages > 0).to(r.dtype)
    t = sapo_temperature_neg + (sapo_temperature_pos - sapo_temperature_neg) * positive
    return -4 / t * torch.sigmoid(t * (r - 1)) * tokens.advantages, {}


def kl_penalty(tokens: SampledLogps, estimator: str = "k3") -> Tensor:
    """An estimate of KL(pi || ref) from each sampled token, (N,), as a term of the loss. d = log pi - log ref.

    The value of a term of the loss does not matter, its gradient does. For samples of pi, in expectation:

        k1  d                   value KL          gradient 0: not offered in the loss
        k2  d^2 / 2             value near KL     gradient of KL(pi || ref)
        k3  exp(-d) + d - 1     value KL          gradient of KL(ref || pi)
        k3_ratio  r times k3    value KL          gradient of KL(pi || ref), also for tokens of an older policy

    Estimators: joschu.net/blog/kl-approx.html. In the reward k1 has the gradient of KL(pi || ref) (`[rloo] beta`).
    """
    assert tokens.ref_token_logps is not None
    d = tokens.token_logps - tokens.ref_token_logps
    if estimator == "k2":
        return d.square() / 2
    k3 = torch.exp(-d) + d - 1
    return k3 * ratios(tokens) if estimator == "k3_ratio" else k3


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange: float = 0.2) -> Tensor:
    """`max((V - R)^2, (V_c - R)^2) / 2` of each token, V_c = V kept within `cliprange` of the old value; (N,).

    R are the returns, advantage + old value. arXiv 1707.06347's implementation in OpenAI's baselines.
    """
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


TOKENS, SEQUENCES, CONSTANT = AVERAGES


def _clipped(name: str, averaged: str, paper: str, average: str = TOKENS) -> LossSpec:
    formula = f"-min(r A, clip(r, 1-eps, 1+eps_high) A), {averaged}"
    return spec_of(clipped_surrogate, formula, paper, name=name, average=average)


_SPECS = (
    _clipped("grpo", "mean of completions' means", "arXiv 2402.03300", SEQUENCES),
    _clipped("dapo", "mean of tokens", "arXiv 2503.14476"),
    _clipped("dr_grpo", "sum of tokens / max. length", "arXiv 2503.20783", CONSTANT),
    spec_of(cispo, "-sg(min(r, eps_high)) A log pi, mean of tokens", "arXiv 2506.13585", detaches=True),
    _clipped("rloo", "r of a completion, mean of completions", "arXiv 2402.14740", SEQUENCES),
    _clipped("ppo", "mean of tokens", "arXiv 1707.06347"),
    spec_of(sapo, "-4/T s(T (r - 1)) A, mean of completions' means", "arXiv 2511.20347", average=SEQUENCES),
)
POLICY_LOSSES: Mapping[str, LossSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})
BUILT_IN.update((*POLICY_LOSSES, "gspo"))  # that one is grpo.importance_sampling_level = "sequence"


def aggregation(kind: str, length: int, max_length: int) -> tuple[float, float]:
    """Weight of each token of a completion in the sum, and what the completion adds to the count of the step.

    sequences: the mean of means, 1/length and 1. tokens: the mean of all tokens, 1 and length. constant: 1 and
    `max_length`, the same for every completion. A completion that is masked adds 0 to both.
    """
    if kind == SEQUENCES:
        return 1 / length, 1.0
    return 1.0, float(length if kind == TOKENS else max_length)

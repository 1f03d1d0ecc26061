"""The losses once more, in float64 and from the configuration alone: nothing of `PreferenceLoss` takes part.

Cross-entropy, `kto`, `sigmoid`, `cdpo`, `robust`, `hinge` and `ipo_sum` are written out here. The other built-in losses
use their function of `lowlevel.losses.preference`, whose values the tests compare with numbers from elsewhere. A user's
own loss is its own formula: its function is called in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowlevel.config.schema import RunConfig
from lowlevel.errors import ConfigError, one_line
from lowlevel.losses import SFT_LOSSES, LabelledLogps, PairLogps, PairRewards, TokenLogps, loss_spec
from lowlevel.losses.registry import LossSpec, find

Logps = PairLogps | TokenLogps | LabelledLogps | PairRewards


def logps_of(
    policy: Sequence[Sequence[Tensor]],
    reference: Sequence[Sequence[Tensor]] | None,
    values: Mapping[str, Tensor],
    *,
    rewards: bool = False,
) -> Logps:
    """What a loss reads, from token log-probabilities [example][chosen, rejected] or [example][whole], (n,) each.

    `reference` is None without one; `values`: numeric columns of the rows, one number an example; for kto with "kl".
    With `rewards` every sequence has one number, its reward.
    """
    lengths = torch.tensor([len(part) for part in _sequences(policy)])
    ids = torch.arange(len(lengths)).repeat_interleave(lengths)
    tokens = torch.cat(_sequences(policy))
    if rewards:
        return PairRewards(*tokens.chunk(2), values=values)
    if len(policy[0]) == 1 and "kl" not in values:
        return TokenLogps(tokens, ids, lengths, values)
    empty = tokens.new_zeros(len(policy))
    if len(policy[0]) == 1:
        assert reference is not None
        rows = LabelledLogps(empty, empty, values["label"] > 0, values["kl"], sequence_ids=ids)
        return with_tokens(rows, tokens, torch.cat(_sequences(reference)))
    chosen, rejected = lengths.chunk(2)
    pairs = PairLogps(empty, empty, empty, empty, chosen, rejected, sequence_ids=ids, values=values)
    return with_tokens(
        pairs, tokens, torch.zeros_like(tokens) if reference is None else torch.cat(_sequences(reference))
    )


def _sequences(examples: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """All chosen completions, then all rejected ones."""
    return [example[side] for side in range(len(examples[0])) for example in examples]


def with_tokens(logps: Logps, policy: Tensor, reference: Tensor | None) -> Logps:
    """The same with other token log-probabilities (N,), all in their dtype; differentiable in them."""
    if isinstance(logps, LabelledLogps):
        assert reference is not None and logps.sequence_ids is not None
        zeros = policy.new_zeros(len(logps.desirable))
        own, ref = (zeros.index_add(0, logps.sequence_ids, tokens) for tokens in (policy, reference))
        kl = logps.kl.to(policy.dtype)
        return replace(logps, logps=own, ref_logps=ref, kl=kl, token_logps=policy, ref_token_logps=reference)
    values = {name: value.to(policy.dtype) for name, value in logps.values.items()}
    if isinstance(logps, TokenLogps):
        return replace(logps, token_logps=policy, values=values)
    if isinstance(logps, PairRewards):
        chosen, rejected = policy.chunk(2)
        return replace(logps, chosen=chosen, rejected=rejected, values=values)
    assert reference is not None and logps.sequence_ids is not None
    zeros = policy.new_zeros(2 * len(logps.chosen_logps))
    sums = [zeros.index_add(0, logps.sequence_ids, tokens).chunk(2) for tokens in (policy, reference)]
    (chosen, rejected), (ref_chosen, ref_rejected) = sums
    return replace(
        logps, chosen_logps=chosen, rejected_logps=rejected, ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected, token_logps=policy, ref_token_logps=reference, values=values,
    )  # fmt: skip


def tokens_of(logps: Logps) -> tuple[Tensor, Tensor | None]:
    """Token log-probabilities under policy and reference, (N,) each; or rewards (2P,)."""
    if isinstance(logps, PairRewards):
        return torch.cat([logps.chosen, logps.rejected]), None
    assert logps.token_logps is not None
    return logps.token_logps, None if isinstance(logps, TokenLogps) else logps.ref_token_logps


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), without overflow, and with the slope 1/2 at exactly 0."""
    return torch.logaddexp(x, torch.zeros_like(x))


def exact_losses(logps: Logps, config: RunConfig) -> Tensor:
    """The configured loss of each pair or example (P,), or token (N,), differentiable in the log-probabilities.

    Raises ConfigError for a user's own loss that fails in float64.
    """
    if isinstance(logps, TokenLogps):
        if config.sft.loss_type == "cross_entropy":
            return -logps.token_logps
        return _by_function(find(config.sft.loss_type, SFT_LOSSES), logps, config.sft.loss_kwargs)
    if isinstance(logps, LabelledLogps):  # eq 8 of arXiv 2402.01306 as printed: 1 - sigmoid
        kto, z0 = config.kto, logps.kl.clamp(min=0)
        desirable = kto.desirable_weight * (1 - 1 / (1 + torch.exp(kto.beta * (z0 - logps.logratios))))
        undesirable = kto.undesirable_weight * (1 - 1 / (1 + torch.exp(kto.beta * (logps.logratios - z0))))
        return torch.where(logps.desirable, desirable, undesirable)
    if isinstance(logps, PairRewards):
        rated = _difference(logps.values, logps.chosen)
        centre = config.reward.center_rewards_coefficient
        return softplus(rated - logps.chosen + logps.rejected) + centre * (logps.chosen + logps.rejected) ** 2
    dpo = config.dpo
    beta, eps, d = dpo.beta, dpo.label_smoothing, logps.deltas
    x = beta * d
    written: dict[str, Callable[[], Tensor]] = {
        "sigmoid": lambda: softplus(-x),
        "cdpo": lambda: (1 - eps) * softplus(-x) + eps * softplus(x),
        "robust": lambda: ((1 - eps) * softplus(-x) - eps * softplus(x)) / (1 - 2 * eps),
        "hinge": lambda: (1 - x).clamp(min=0),
        "ipo_sum": lambda: (d - 1 / (2 * beta)) ** 2,
    }
    if dpo.loss_type in written:
        return written[dpo.loss_type]()
    return _by_function(loss_spec(dpo.loss_type), logps, dpo.model_dump() | dpo.loss_kwargs)


def _difference(values: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The rated margin of a pair: its column, or the difference of both scores; 0 without columns."""
    if not values or "margin" in values:
        return values.get("margin", torch.zeros_like(like))
    chosen, rejected = (next(v for name, v in values.items() if side in name) for side in ("chosen", "rejected"))
    return chosen - rejected


def _by_function(spec: LossSpec, logps: Logps, values: Mapping[str, float | None]) -> Tensor:
    used = {name: values[name] for name in spec.parameters if values.get(name) is not None}
    try:
        return spec(logps, used)[0]
    except Exception as error:
        if not spec.own:
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"loss {spec.name!r} fails in float64: {reason}; keep the dtype of its tensors") from error


def slopes(logps: Logps, config: RunConfig) -> tuple[Tensor, Tensor]:
    """d sum(losses) / d log-probability of each token, under policy and reference, (N,) float64 each; 0 without one.

    sigmoid: -beta sigma(-x) for a chosen token, arXiv 2305.18290 section 4; the opposite for a rejected token, and for
    the reference's chosen one. Other losses: autograd in float64.
    """
    tokens, reference = tokens_of(logps)
    if isinstance(logps, PairLogps) and config.dpo.loss_type == "sigmoid":
        slope = -config.dpo.beta / (1 + torch.exp(config.dpo.beta * logps.deltas))
        of_policy = torch.cat([slope, -slope])[logps.sequence_ids]
        return of_policy, -of_policy
    return gradients(logps, tokens, reference, lambda moved: exact_losses(moved, config))


def gradients(
    logps: Logps, tokens: Tensor, reference: Tensor | None, losses: Callable[[Logps], Tensor]
) -> tuple[Tensor, Tensor]:
    """Autograd of the summed `losses` in the token log-probabilities of policy and reference, in their dtype."""
    leaves = [t.detach().clone().requires_grad_() for t in (tokens, reference) if t is not None]
    total = losses(with_tokens(logps, leaves[0], leaves[-1])).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    parts = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
    return parts[0], parts[1] if len(parts) == 2 else torch.zeros_like(parts[0])

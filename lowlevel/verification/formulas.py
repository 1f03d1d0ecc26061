"""The losses once more, in float64 and from the configuration alone: nothing of `PreferenceLoss` takes part.

Cross-entropy with label smoothing and z-loss, `kto`, `sigmoid`, `cdpo`, `robust`, `hinge` and `ipo_sum` are written out
here. The other built-in losses use their function of `lowlevel.losses`, whose values the tests compare with numbers
from elsewhere. A user's own loss is its own formula: its function is called in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lowlevel.config.offline import SFTConfig
from lowlevel.config.schema import RunConfig
from lowlevel.errors import ConfigError, one_line
from lowlevel.losses import SFT_LOSSES, LabelledLogps, PairLogps, PairRewards, TokenLogps, loss_spec
from lowlevel.losses.registry import LossSpec, find

Logps = PairLogps | TokenLogps | LabelledLogps | PairRewards


def with_tokens(logps: Logps, policy: Tensor, reference: Tensor | None) -> Logps:
    """The same with other scores of the tokens (`tokens_of`), all in their dtype; differentiable in them."""
    if isinstance(logps, LabelledLogps):
        assert reference is not None and logps.sequence_ids is not None
        zeros, parts = policy.new_zeros(len(logps.desirable)), (policy[:, 0], reference[:, 0])
        own, ref = (zeros.index_add(0, logps.sequence_ids, part) for part in parts)
        kl = logps.kl.to(policy.dtype)
        return replace(logps, logps=own, ref_logps=ref, kl=kl, token_logps=parts[0], ref_token_logps=parts[1])
    values = {name: value.to(policy.dtype) for name, value in logps.values.items()}
    tokens, *columns = policy.unbind(1)
    if isinstance(logps, PairRewards):
        chosen, rejected = tokens.chunk(2)
        return replace(logps, chosen=chosen, rejected=rejected, values=values)
    statistics = dict(zip(logps.statistics, columns, strict=True))
    if isinstance(logps, TokenLogps):
        weights = None if logps.weights is None else logps.weights.to(policy.dtype)
        return replace(logps, token_logps=tokens, values=values, statistics=statistics, weights=weights)
    assert reference is not None and logps.sequence_ids is not None
    zeros = tokens.new_zeros(2 * len(logps.chosen_logps))
    sums = [zeros.index_add(0, logps.sequence_ids, part).chunk(2) for part in (tokens, reference[:, 0])]
    (chosen, rejected), (ref_chosen, ref_rejected) = sums
    return replace(
        logps, chosen_logps=chosen, rejected_logps=rejected, ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected, token_logps=tokens, ref_token_logps=reference[:, 0], values=values,
        statistics=statistics,
    )  # fmt: skip


def tokens_of(logps: Logps) -> tuple[Tensor, Tensor | None]:
    """Scores of the tokens: (N, 1 + K) under the policy, the log-probability and the K statistics that the loss reads;
    (N, 1) under the reference, None without one. Of a reward model: rewards (2P, 1).
    """
    if isinstance(logps, PairRewards):
        return torch.cat([logps.chosen, logps.rejected])[:, None], None
    assert logps.token_logps is not None
    reference = None if isinstance(logps, TokenLogps) else logps.ref_token_logps
    statistics = {} if isinstance(logps, LabelledLogps) else logps.statistics
    scores = torch.stack([logps.token_logps, *statistics.values()], dim=1)
    return scores, None if reference is None else reference[:, None]


def count_of(logps: Logps) -> float:
    """What a sum of losses is divided by: pairs, examples (kto), tokens, or the sum of the tokens' weights."""
    if isinstance(logps, PairRewards):
        return len(logps.chosen)
    if isinstance(logps, PairLogps):
        return len(logps.chosen_logps)
    if isinstance(logps, LabelledLogps):
        return len(logps.desirable)
    return len(logps.token_logps) if logps.weights is None else float(logps.weights.sum())


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), without overflow, and with the slope 1/2 at exactly 0."""
    return torch.logaddexp(x, torch.zeros_like(x))


def exact_losses(logps: Logps, config: RunConfig) -> Tensor:
    """The configured loss of each pair or example (P,), or token (N,), differentiable in the log-probabilities.

    Raises ConfigError for a user's own loss that fails in float64.
    """
    if isinstance(logps, TokenLogps):
        return _exact_token_losses(logps, config.sft)
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


def _exact_token_losses(logps: TokenLogps, sft: SFTConfig) -> Tensor:
    statistics = logps.statistics
    if sft.loss_type == "cross_entropy":
        losses = -logps.token_logps
    elif sft.loss_type == "smoothed_cross_entropy":
        eps = 0.1 if sft.label_smoothing is None else sft.label_smoothing
        losses = (eps - 1) * logps.token_logps - eps * statistics["mean_logp"]
    else:
        losses = _by_function(find(sft.loss_type, SFT_LOSSES), logps, sft.loss_kwargs)
    losses = losses + sft.z_loss_weight * statistics["lse"] ** 2 if sft.z_loss_weight else losses
    return losses if logps.weights is None else logps.weights * losses


def _difference(values: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The rated margin of a pair: its column, or the difference of both scores; 0 without columns."""
    if not values or "margin" in values:
        return values.get("margin", torch.zeros_like(like))
    chosen, rejected = (next(v for name, v in values.items() if side in name) for side in ("chosen", "rejected"))
    return chosen - rejected


def _by_function(spec: LossSpec, logps: Logps, values: Mapping[str, float | None]) -> Tensor:
    return in_float64(spec, logps, {n: values[n] for n in spec.parameters if values.get(n) is not None})


def in_float64(spec: LossSpec, logps: Any, used: Mapping[str, Any]) -> Tensor:
    """The losses by the loss's own function. Raises ConfigError if it is a custom one and fails in this dtype."""
    try:
        return spec(logps, used)[0]
    except Exception as error:
        if not spec.own:
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"loss {spec.name!r} fails in float64: {reason}; keep the dtype of its tensors") from error


def slopes(logps: Logps, config: RunConfig) -> tuple[Tensor, Tensor]:
    """d sum(losses) / d scores of each token, under policy and reference, as `tokens_of`, float64; 0 without one.

    sigmoid: -beta sigma(-x) for a chosen token, arXiv 2305.18290 section 4; the opposite for a rejected token, and for
    the reference's chosen one. Other losses: autograd in float64.
    """
    tokens, reference = tokens_of(logps)
    if isinstance(logps, PairLogps) and config.dpo.loss_type == "sigmoid":
        slope = -config.dpo.beta / (1 + torch.exp(config.dpo.beta * logps.deltas))
        of_policy = torch.cat([slope, -slope])[logps.sequence_ids, None]
        return of_policy, -of_policy
    return gradients(logps, tokens, reference, lambda moved: exact_losses(moved, config))


class Attached(TorchFunctionMode):
    """Within this mode `detach` is without effect."""

    def __torch_function__(
        self, func: Any, types: Iterable[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Skip `detach`."""
        return args[0] if func is Tensor.detach else func(*args, **(kwargs or {}))


def value_slopes(logps: Logps, config: RunConfig) -> tuple[Tensor, Tensor]:
    """`slopes` of the loss's value, which also depends on what the loss detaches: how far an error moves it."""
    with Attached():
        return slopes(logps, config)


def gradients(
    logps: Logps, tokens: Tensor, reference: Tensor | None, losses: Callable[[Logps], Tensor]
) -> tuple[Tensor, Tensor]:
    """Autograd of the summed `losses` in the token log-probabilities of policy and reference, in their dtype."""
    leaves = [t.detach().clone().requires_grad_() for t in (tokens, reference) if t is not None]
    total = losses(with_tokens(logps, leaves[0], leaves[-1])).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    parts = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
    return parts[0], parts[1] if len(parts) == 2 else torch.zeros_like(parts[0])

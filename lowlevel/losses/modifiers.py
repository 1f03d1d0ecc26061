"""Variants of DPO's sigmoid loss: other divergences, discounted tails, rated margins, and sums of several losses.

Symbols as in `lowlevel.losses.dpo`: `a`, `b` log-ratios of the chosen and the rejected completion, `ls = log s`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lowlevel.losses.dpo import PairLogps, token_counts
from lowlevel.losses.registry import LossSpec

LARGEST_EXPONENT = 60.0  # e^60 = 1e26: its square still fits in fp32


def f_forward_kl(pairs: PairLogps, *, beta: float) -> Tensor:
    """f-DPO, forward KL: `-ls(beta (exp(-b) - exp(-a)))`. Wang et al., arXiv 2309.16240.

    An exponent above 60 counts as 60, without a gradient.
    """
    return -logsigmoid(beta * (_exp(-pairs.rejected_logratios) - _exp(-pairs.chosen_logratios)))


def f_js(pairs: PairLogps, *, beta: float) -> Tensor:
    """f-DPO, Jensen-Shannon: `-ls(beta (ls(a) - ls(b)))`. Wang et al., arXiv 2309.16240."""
    return -logsigmoid(beta * (logsigmoid(pairs.chosen_logratios) - logsigmoid(pairs.rejected_logratios)))


def f_alpha(pairs: PairLogps, *, beta: float, f_alpha: float = 0.5) -> Tensor:
    """f-DPO, alpha divergence: `-ls(beta (g(a) - g(b))), g(r) = (exp((alpha-1) r) - 1) / (alpha-1)`.

    Wang et al., arXiv 2309.16240. alpha in [0, 1): 0 is `f_forward_kl`, and alpha -> 1 is DPO.
    An exponent above 60 counts as 60, without a gradient.
    """
    power = f_alpha - 1
    chosen, rejected = _exp(power * pairs.chosen_logratios), _exp(power * pairs.rejected_logratios)
    return -logsigmoid(beta * (chosen - rejected) / power)


def ld_dpo(pairs: PairLogps, *, beta: float, ld_alpha: float = 0.5) -> Tensor:
    """LD-DPO: `-ls(x), tokens after min(n+, n-) times alpha`. Liu et al., arXiv 2409.06411.

    Policy and reference: log pi(y) = sum_{t <= m} l_t + alpha sum_{t > m} l_t with m = min(n+, n-). alpha = 1 is DPO.
    """
    if pairs.token_logps is None or pairs.ref_token_logps is None or pairs.sequence_ids is None:
        raise ValueError("ld_dpo reads single tokens: it needs token_logps, ref_token_logps and sequence_ids")
    ids, size = pairs.sequence_ids, len(pairs.chosen_logps)
    order = torch.arange(len(ids), device=ids.device)
    first = torch.full((2 * size + 1,), len(ids), device=ids.device).scatter_reduce(0, ids, order, "amin")
    lengths = torch.bincount(ids, minlength=2 * size + 1) if pairs.chosen_lengths is None else _lengths(pairs)
    shared = torch.minimum(lengths[:size], lengths[size : 2 * size]).repeat(2)
    shared = torch.cat([shared, shared.new_zeros(1)])  # of dummy tokens
    weights = torch.where(order - first[ids] < shared[ids], 1.0, ld_alpha)
    logratios = pairs.completion_sums(weights * (pairs.token_logps - pairs.ref_token_logps))
    return -logsigmoid(beta * (logratios[:size] - logratios[size:]))


def wpo(pairs: PairLogps, *, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """WPO: `-sg(w+ w-) ls(x), w = exp(mean_t (l_t - log sum_v p_v^2))`. Zhou et al., arXiv 2406.11827 eq 2.

    p_v: probabilities of the vocabulary under the policy, l_t: log-probability of a completion's token. A pair counts
    as much as its completions are like the policy's own. The weights have no gradient.
    """
    if pairs.token_logps is None or "log_square_sum" not in pairs.statistics:
        raise ValueError("wpo reads single tokens: it needs token_logps, sequence_ids and statistics")
    likeness = pairs.completion_sums(pairs.token_logps.detach() - pairs.statistics["log_square_sum"])
    chosen, rejected = likeness.chunk(2)
    chosen_count, rejected_count = token_counts(pairs)
    weights = torch.exp(chosen / chosen_count + rejected / rejected_count)  # w+ w-, eq 2
    return -weights * logsigmoid(beta * pairs.deltas), {"wpo_weight": weights}


def odpo(pairs: PairLogps, *, beta: float, odpo_alpha: float = 1.0) -> Tensor:
    """DPO with an offset: `-ls(x - alpha m)`, m the rated margin. Amini et al., arXiv 2402.10571.

    m is the column "margin", or the difference of the columns "chosen_score" and "rejected_score" (also
    "score_chosen", "score_rejected"); `data.columns` names them.
    """
    return -logsigmoid(beta * pairs.deltas - odpo_alpha * rated_margins(pairs.values))


MARGIN_COLUMNS = (("margin",), ("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))


def rated_margins(values: Mapping[str, Tensor]) -> Tensor:
    """The margin of each rated pair, (P,). Raises ValueError if no columns of `MARGIN_COLUMNS` are there."""
    for names in MARGIN_COLUMNS:
        if all(name in values for name in names):
            return values[names[0]] - values[names[1]] if len(names) == 2 else values[names[0]]
    known = " or ".join(str(list(names)).replace("'", '"') for names in MARGIN_COLUMNS)
    raise ValueError(f"this loss reads a rated margin: set data.columns = {known}")


def _exp(exponent: Tensor) -> Tensor:
    return torch.exp(exponent.clamp(max=LARGEST_EXPONENT))


def _lengths(pairs: PairLogps) -> Tensor:
    assert pairs.chosen_lengths is not None and pairs.rejected_lengths is not None
    return torch.cat([pairs.chosen_lengths, pairs.rejected_lengths])


@dataclass(frozen=True)
class Mixture:
    """A weighted sum of losses, which share their hyper-parameters by name."""

    terms: tuple[tuple[float, LossSpec], ...]

    def __call__(self, pairs: PairLogps, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss of each pair, and each term without its weight as a metric `loss/NAME`."""
        total, metrics = torch.zeros_like(pairs.chosen_logps), dict[str, Tensor]()
        for weight, spec in self.terms:
            losses, more = spec(pairs, {name: settings[name] for name in spec.parameters if name in settings})
            total = total + weight * losses
            metrics |= {f"loss/{spec.name}": losses, **more}
        return total, metrics


def mixture(text: str, find: Callable[[str], LossSpec]) -> LossSpec:
    """The loss of "0.8*sigmoid + 0.2*bco_pair + nll", as MPO (arXiv 2411.10442) mixes three.

    Raises ValueError: a term that is not WEIGHT*NAME or NAME, a weight that is not above 0, or an unknown loss.
    """
    terms = []
    for part in re.split(r"(?<![eE*])\+", text):
        number, star, name = part.rpartition("*")
        weight = _weight(number.strip()) if star else 1.0
        if not (0 < weight < math.inf) or not name.strip():
            raise ValueError(
                f'loss_type {text!r}: {part.strip()!r} is not "NAME" or "WEIGHT*NAME" with a weight above 0'
            )
        terms.append((weight, find(name.strip())))
    specs = [spec for _, spec in terms]
    needs = ("needs_lengths", "needs_tokens", "needs_margin", "mixes_pairs", "detaches")
    flags: dict[str, Any] = {flag: any(getattr(spec, flag) for spec in specs) for flag in needs}
    return LossSpec(
        name=" + ".join(f"{weight:g}*{spec.name}" for weight, spec in terms),
        function=Mixture(tuple(terms)),
        formula=" + ".join(f"{weight:g} ({spec.formula})" for weight, spec in terms),
        paper=", ".join(dict.fromkeys(spec.paper for spec in specs)),
        parameters=tuple(dict.fromkeys(name for spec in specs for name in spec.parameters)),
        averages=any(spec.averages for spec in specs)  # beside nll, which has no beta and no reward of its own
        and all(spec.averages or (spec.reference_free and "beta" not in spec.parameters) for spec in specs),
        reference_free=all(spec.reference_free for spec in specs),
        own=any(spec.own for spec in specs),
        statistics=tuple(dict.fromkeys(name for spec in specs for name in spec.statistics)),
        **flags,
    )


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

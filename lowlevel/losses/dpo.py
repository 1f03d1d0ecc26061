"""DPO's loss and its relatives, one plain function each: four log-probabilities per pair in, one loss per pair out.

Symbols, per pair: `a = log pi(y+) - log ref(y+)`, `b` likewise for `y-`, `d = a - b`, `x = beta d`; `n+`, `n-` are the
completion lengths, `eps` is label_smoothing, `s` the sigmoid and `ls = log s`. A docstring gives the formula in these
symbols, and the paper. Keyword arguments are the hyper-parameters, whose ranges `lowlevel.losses.dpo_table` checks.

Every loss and gradient is finite at x = +-1000: `ls` is never `log(sigmoid())`, which is -inf below x = -104 in fp32,
and the exponent of the one bare exponential (DiscoPOP) cannot be positive.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of P pairs under policy and reference, summed over a completion; each (P,) and floating.

    `chosen_lengths` and `rejected_lengths` (P,) are the numbers of tokens in those sums. Training also sets:

    Attributes:
        token_logps: (N,) fp32, of every completion token under the policy.
        ref_token_logps: (N,) fp32, likewise under the reference; None if a cache gave the sums.
        sequence_ids: (N,) int64, the completion of each token: i is the chosen one of pair i, P + i its rejected one,
            2P marks a dummy token.
        values: numeric columns of the rows that `data.columns` names, (P,) fp32 each.
        statistics: of the vocabulary at each token under the policy, those that the loss declares, (N,) fp32 each.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    token_logps: Tensor | None = None
    ref_token_logps: Tensor | None = None
    sequence_ids: Tensor | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    statistics: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)

    def completion_sums(self, token_values: Tensor) -> Tensor:
        """The (N,) values of tokens summed by completion, (2P,): all chosen, then all rejected; without dummies."""
        assert self.sequence_ids is not None
        completions = torch.arange(2 * len(self.chosen_logps), device=self.sequence_ids.device)
        return torch.where(self.sequence_ids == completions[:, None], token_values, 0.0).sum(1)  # in a fixed order

    @property
    def chosen_logratios(self) -> Tensor:
        """`a`, policy minus reference for the chosen completion, (P,)."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """`b`, policy minus reference for the rejected completion, (P,)."""
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def deltas(self) -> Tensor:
        """`d = a - b`, (P,); beta times this is the margin, the sigmoid's argument."""
        return self.chosen_logratios - self.rejected_logratios


def sigmoid(pairs: PairLogps, *, beta: float) -> Tensor:
    """DPO: `-ls(x)`. Rafailov et al., arXiv 2305.18290 eq 7."""
    return -logsigmoid(beta * pairs.deltas)  # eq 7


def cdpo(pairs: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """Conservative DPO: `-(1-eps) ls(x) - eps ls(-x)`. Mitchell, ericmitchell.ai/cdpo.pdf eq 3.

    It assumes a share eps of flipped labels; the gradient vanishes at `x = log((1-eps)/eps)`.
    """
    return _smoothed_logistic(beta * pairs.deltas, label_smoothing)  # eq 3


def robust(pairs: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO: `(-(1-eps) ls(x) + eps ls(-x)) / (1-2 eps)`. Chowdhury et al., arXiv 2403.00409.

    Unbiased: over labels flipped with probability eps its mean is the clean DPO loss. Negative for confident pairs.
    """
    x = beta * pairs.deltas
    clean, flipped = -logsigmoid(x), -logsigmoid(-x)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(pairs: PairLogps, *, beta: float) -> Tensor:
    """Hinge: `max(0, 1 - x)`. SLiC-HF, arXiv 2305.10425; normalised as in RSO, arXiv 2309.06657."""
    return torch.relu(1 - beta * pairs.deltas)


def ipo(pairs: PairLogps, *, beta: float) -> Tensor:
    """IPO, token average: `(a/n+ - b/n- - 1/(2 beta))^2`. Azar et al., arXiv 2310.12036 eq 17.

    The paper sums over tokens (`ipo_sum`); TRL averages, as confirmed by the authors. Needs lengths.
    """
    average_a, average_b = _average_logratios(pairs)
    return (average_a - average_b - 1 / (2 * beta)) ** 2  # eq 17


def ipo_sum(pairs: PairLogps, *, beta: float) -> Tensor:
    """IPO as printed: `(d - 1/(2 beta))^2`. Azar et al., arXiv 2310.12036 eq 17."""
    return (pairs.deltas - 1 / (2 * beta)) ** 2  # eq 17


def exo_pair(pairs: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """EXO-pref, K = 2: `s(x)(ls(x) - log(1-eps)) + s(-x)(ls(-x) - log eps)`. Ji et al., arXiv 2402.00856 eq 16.

    The reverse KL from (s(x), s(-x)) to (1-eps, eps), so eps must be above 0.
    """
    x = beta * pairs.deltas
    chosen = torch.sigmoid(x) * (logsigmoid(x) - math.log1p(-label_smoothing))
    rejected = torch.sigmoid(-x) * (logsigmoid(-x) - math.log(label_smoothing))
    return chosen + rejected  # eq 16


def nca_pair(pairs: PairLogps, *, beta: float) -> Tensor:
    """NCA, K = 2: `-ls(beta a) - ls(-beta a)/2 - ls(-beta b)/2`. Chen et al., arXiv 2402.05369."""
    chosen, rejected = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(pairs: PairLogps, *, beta: float) -> Tensor:
    """BCO without its reward shift: `-ls(beta a) - ls(-beta b)`. Jung et al., arXiv 2404.04656."""
    return -logsigmoid(beta * pairs.chosen_logratios) - logsigmoid(-beta * pairs.rejected_logratios)


def sppo_hard(pairs: PairLogps, *, beta: float) -> Tensor:
    """SPPO, win rates 1 and 0: `(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2`. Wu et al., arXiv 2405.00675 eq 4.7."""
    target = 1 / (2 * beta)
    return (pairs.chosen_logratios - target) ** 2 + (pairs.rejected_logratios + target) ** 2  # eq 4.7 with P = 1, 0


def aot(pairs: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT, paired: `cdpo on sort(log pi(y+) - log pi(y-)) - sort(log ref(y+) - log ref(y-))`. arXiv 2406.05882.

    Element i belongs to the i-th quantile of the batch, not to pair i; the sum depends on the pairs of the batch.
    """
    policy = (pairs.chosen_logps - pairs.rejected_logps).sort().values
    reference = (pairs.ref_chosen_logps - pairs.ref_rejected_logps).sort().values
    return _smoothed_logistic(beta * (policy - reference), label_smoothing)


def aot_unpaired(pairs: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT, unpaired: `cdpo on sort(a) - sort(b)`. Melnyk et al., arXiv 2406.05882. Quantiles, as in `aot`."""
    deltas = pairs.chosen_logratios.sort().values - pairs.rejected_logratios.sort().values
    return _smoothed_logistic(beta * deltas, label_smoothing)


def apo_zero(pairs: PairLogps, *, beta: float) -> Tensor:
    """APO-zero: `1 - s(beta a) + s(beta b)`. D'Oosterlinck et al., arXiv 2408.06266 eq 7."""
    # s(-z) instead of 1 - s(z), which is 0 in fp32 beyond z = 17
    return torch.sigmoid(-beta * pairs.chosen_logratios) + torch.sigmoid(beta * pairs.rejected_logratios)  # eq 7


def apo_down(pairs: PairLogps, *, beta: float) -> Tensor:
    """APO-down: `s(beta a) + 1 - s(x)`. D'Oosterlinck et al., arXiv 2408.06266 eq 8."""
    return torch.sigmoid(beta * pairs.chosen_logratios) + torch.sigmoid(-beta * pairs.deltas)  # eq 8, s(-z) = 1 - s(z)


def discopop(pairs: PairLogps, *, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP: `-(1-m) ls(x) + m exp(-x), m = s(x/tau)`. Lu et al., arXiv 2406.08414 eq 5. Needs 0 < tau <= 1.

    At x = 0 its gradient in x is positive (0.78 at tau = 0.05): the first step lowers the margin.
    """
    x = beta * pairs.deltas
    # m exp(-x) as one exponential: as a product it is 0 * inf = NaN below x = -88 in fp32 (TRL 1.16). The exponent
    # ls(x/tau) - x is below x/tau - x <= 0 for x < 0 and below -x for x >= 0, so for tau <= 1 nothing overflows.
    exponential = torch.exp(logsigmoid(x / discopop_tau) - x)
    return -torch.sigmoid(-x / discopop_tau) * logsigmoid(x) + exponential  # eq 5


def sigmoid_norm(pairs: PairLogps, *, beta: float) -> Tensor:
    """Length-normalised: `-ls(beta (a/n+ - b/n-))`. Lambert et al. (Tulu 3), arXiv 2411.15124 eq 6. Needs lengths."""
    average_a, average_b = _average_logratios(pairs)
    return -logsigmoid(beta * (average_a - average_b))  # eq 6


def dpop(pairs: PairLogps, *, beta: float, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-Positive: `-ls(x - beta lambda max(0, -a))`. Pal et al. (Smaug), arXiv 2402.13228.

    At the kink a = 0, where every run begins, relu's gradient is 0: the first step is DPO's.
    """
    penalty = torch.relu(-pairs.chosen_logratios)
    return -logsigmoid(beta * (pairs.deltas - dpop_lambda * penalty))


def rpo(pairs: PairLogps, *, beta: float, rpo_alpha: float = 1.0) -> Tensor:
    """DPO plus NLL: `-ls(x) - alpha log pi(y+) / n+`. Pang et al., arXiv 2404.19733. Needs lengths.

    alpha weighs the NLL term, as TRL's `rpo_alpha` did; each pair averages over its own tokens.
    """
    nll = -pairs.chosen_logps / token_counts(pairs)[0]
    return sigmoid(pairs, beta=beta) + rpo_alpha * nll


def _smoothed_logistic(x: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)


def _average_logratios(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    chosen_count, rejected_count = token_counts(pairs)
    return pairs.chosen_logratios / chosen_count, pairs.rejected_logratios / rejected_count


def token_counts(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """Tokens of the chosen and the rejected completions, (P,) each, at least 1: an empty completion's average is 0."""
    if pairs.chosen_lengths is None or pairs.rejected_lengths is None:
        raise ValueError("this loss averages over tokens: pass chosen_lengths and rejected_lengths")
    return pairs.chosen_lengths.clamp(min=1), pairs.rejected_lengths.clamp(min=1)

"""Preference losses without a reference: only the policy's log-probabilities enter, and no reference pass is run.

Symbols: `p+ = log pi(y+)` summed over the n+ tokens of the chosen completion, `p-` likewise for the rejected one; the
others are those of `lowlevel.losses.dpo`. The reported reward of a completion is beta p; where the loss compares
averages (SimPO, ORPO), it is beta p/n.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lowlevel.losses.dpo import PairLogps, token_counts

LN2 = 0.6931471805599453


def nll(pairs: PairLogps) -> Tensor:
    """Supervised loss of the chosen completion: `-p+/n+`, maximum likelihood. A term for weighted sums of losses."""
    return -pairs.chosen_logps / token_counts(pairs)[0]


def cpo(pairs: PairLogps, *, beta: float, cpo_alpha: float = 1.0) -> Tensor:
    """CPO: `-ls(beta (p+ - p-)) - alpha p+/n+`. Xu et al., arXiv 2401.08417.

    The paper prints the NLL term as a sum over tokens (`cpo_sum`); the authors' code averages over tokens.
    """
    return _reference_free_dpo(pairs, beta) + cpo_alpha * nll(pairs)


def cpo_sum(pairs: PairLogps, *, beta: float, cpo_alpha: float = 1.0) -> Tensor:
    """CPO as printed: `-ls(beta (p+ - p-)) - alpha p+`. Xu et al., arXiv 2401.08417."""
    return _reference_free_dpo(pairs, beta) - cpo_alpha * pairs.chosen_logps


def simpo(pairs: PairLogps, *, beta: float, simpo_gamma: float = 1.0) -> Tensor:
    """SimPO: `-ls(beta (p+/n+ - p-/n-) - gamma)`. Meng et al., arXiv 2405.14734.

    gamma is outside of beta, as in the paper: its code's `gamma_beta_ratio` is gamma / beta.
    """
    chosen, rejected = _averages(pairs)
    return -logsigmoid(beta * (chosen - rejected) - simpo_gamma)


def orpo(pairs: PairLogps, *, orpo_lambda: float = 0.1) -> Tensor:
    """ORPO: `-p+/n+ - lambda ls(o(p+/n+) - o(p-/n-)), o(p) = p - log(1 - exp(p))`. Hong et al., arXiv 2403.07691.

    o are the log-odds of a completion. The NLL term covers the completion, without the prompt.
    """
    chosen, rejected = _averages(pairs)
    log_odds_ratio = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return -chosen - orpo_lambda * logsigmoid(log_odds_ratio)


def log1mexp(x: Tensor) -> Tensor:
    """`log(1 - exp(x))` of x < 0, exact near 0 and for very negative x; x = 0 counts as the largest number below it.

    Maechler (2012), "Accurately computing log(1 - exp(-|a|))": `log1p(-exp(x))` is -inf in fp32 above x = -3e-8.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -LN2
    # each branch gets arguments where it is finite: a NaN of the branch not taken would reach the gradient
    return torch.where(
        near, torch.log(-torch.expm1(x.clamp(min=-LN2))), torch.log1p(-torch.exp(torch.where(near, -LN2, x)))
    )


def _reference_free_dpo(pairs: PairLogps, beta: float) -> Tensor:
    return -logsigmoid(beta * (pairs.chosen_logps - pairs.rejected_logps))


def _averages(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    chosen_count, rejected_count = token_counts(pairs)
    return pairs.chosen_logps / chosen_count, pairs.rejected_logps / rejected_count

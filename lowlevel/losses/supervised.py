"""The losses of supervised fine-tuning: log-probabilities of supervised tokens in, one loss per token out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from lowlevel.losses.registry import LossSpec, spec_of


@dataclass(frozen=True)
class TokenLogps:
    """Log-probabilities (natural logarithms) of N supervised tokens of S examples.

    Attributes:
        token_logps: (N,) fp32.
        sequence_ids: (N,) int64, the example of each token; S marks a dummy token, excluded from all sums.
        lengths: (S,) supervised tokens of each example.
        values: numeric columns of the rows that `data.columns` names, (S,) fp32 each.
    """

    token_logps: Tensor
    sequence_ids: Tensor
    lengths: Tensor
    values: Mapping[str, Tensor] = field(default_factory=dict)


def cross_entropy(tokens: TokenLogps) -> Tensor:
    """Cross-entropy in nats: `-log pi(y_t | y_<t)`."""
    return -tokens.token_logps


SFT_LOSSES: Mapping[str, LossSpec] = MappingProxyType(
    {"cross_entropy": spec_of(cross_entropy, "-log pi(y_t | y_<t)", "maximum likelihood")}
)

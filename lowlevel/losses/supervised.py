"""The losses of supervised fine-tuning: log-probabilities of supervised tokens in, one loss per token out.

p_v is the probability of token v of the vocabulary, y_t the token of the data, sg stops the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from lowlevel.losses.registry import BUILT_IN, LossSpec, find, spec_of


@dataclass(frozen=True)
class TokenLogps:
    """Log-probabilities (natural logarithms) of N supervised tokens of S examples.

    Attributes:
        token_logps: (N,) fp32.
        sequence_ids: (N,) int64, the example of each token; S marks a dummy token, excluded from all sums.
        lengths: (S,) supervised tokens of each example.
        values: numeric columns of the rows that `data.columns` names, (S,) fp32 each.
        statistics: of the vocabulary at each token, those that the loss declares, (N,) fp32 each.
        weights: (N,) fp32, by which each token's loss is multiplied afterwards; None: 1.
    """

    token_logps: Tensor
    sequence_ids: Tensor
    lengths: Tensor
    values: Mapping[str, Tensor] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None


def cross_entropy(tokens: TokenLogps) -> Tensor:
    """Cross-entropy in nats: `-log pi(y_t | y_<t)`."""
    return -tokens.token_logps


def smoothed_cross_entropy(tokens: TokenLogps, *, label_smoothing: float = 0.1) -> Tensor:
    """`-(1-eps) log pi(y_t | y_<t) - eps mean_v log p_v`. Szegedy et al., arXiv 1512.00567 section 7.

    The target gives eps / V to each of the V tokens, as in torch.nn.functional.cross_entropy.
    """
    return -(1 - label_smoothing) * tokens.token_logps - label_smoothing * tokens.statistics["mean_logp"]


def dft(tokens: TokenLogps) -> Tensor:
    """Dynamic fine-tuning: `-sg(pi(y_t | y_<t)) log pi(y_t | y_<t)`. Wu et al., arXiv 2508.05629."""
    return -tokens.token_logps.detach().exp() * tokens.token_logps


SMOOTHED = "-(1-eps) log pi(y_t | y_<t) - eps mean_v log p_v"
_SPECS = (
    spec_of(cross_entropy, "-log pi(y_t | y_<t)", "maximum likelihood"),
    spec_of(smoothed_cross_entropy, SMOOTHED, "arXiv 1512.00567", statistics=("mean_logp",)),
    spec_of(dft, "-sg(pi(y_t | y_<t)) log pi(y_t | y_<t)", "arXiv 2508.05629", detaches=True),
)
SFT_LOSSES: Mapping[str, LossSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})
BUILT_IN.update(SFT_LOSSES)


@dataclass(frozen=True)
class SupervisedLoss:
    """A token loss with its hyper-parameters; `z_loss_weight` adds PaLM's z-loss to any of them.

    z-loss: `weight lse^2`, lse = log sum_v exp(z_v), keeps the logits' normaliser near 1 (arXiv 2204.02311 section 5).
    """

    spec: LossSpec
    settings: Mapping[str, float]  # keyword arguments of the loss function
    z_loss_weight: float = 0.0

    @classmethod
    def of(cls, loss_type: str, *, z_loss_weight: float = 0.0, **given: float | None) -> SupervisedLoss:
        """The loss of a name; None counts as not given. Raises ValueError: an unknown loss, or an unused setting."""
        spec = find(loss_type, SFT_LOSSES)
        settings = {name: value for name, value in given.items() if value is not None}
        for name in (name for name in settings if name not in spec.parameters):
            users = ", ".join(repr(other.name) for other in SFT_LOSSES.values() if name in other.parameters)
            found = f"does not use {name} (got {settings[name]}); used by {users or 'no loss'}"
            raise ValueError(f"loss_type {spec.name!r} {found}")
        return cls(spec, settings, z_loss_weight)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Statistics of the vocabulary that loss and z-loss read."""
        return tuple(dict.fromkeys((*self.spec.statistics, *["lse"] * (self.z_loss_weight > 0))))

    def __call__(self, tokens: TokenLogps) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of each token, times its weight, and metrics without weights, (N,) each."""
        losses, metrics = self.spec(tokens, self.settings)
        if self.z_loss_weight > 0:
            z_losses = self.z_loss_weight * tokens.statistics["lse"].square()
            losses, metrics = losses + z_losses, {**metrics, "z_loss": z_losses.detach()}
        return losses if tokens.weights is None else losses * tokens.weights, metrics

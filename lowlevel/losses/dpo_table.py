"""The table of the preference losses, by `dpo.loss_type`, and `dpo_loss`, which checks its arguments.

A hyper-parameter that the chosen loss does not use is an error: a run must not report cDPO and train DPO (TRL 1.16
ignores `label_smoothing` for `sigmoid`). Which ones a loss uses follows from its signature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lowlevel.losses import dpo, modifiers, reference_free
from lowlevel.losses.dpo import PairLogps, token_counts
from lowlevel.losses.registry import BUILT_IN, LossSpec, find, spec_of


@dataclass(frozen=True)
class DPOOutput:
    """Result of `dpo_loss`; each (P,) fp32, float64 if a log-probability was. Only `losses` has a gradient.

    `chosen_rewards`, `rejected_rewards` = beta * log-ratio (arXiv 2305.18290 eq 5), of simpo and orpo its mean over the
    completion's tokens (arXiv 2405.14734); `margins` their difference.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # of a user's own loss, (P,) each


BETA, BETAS = 0.1, {"simpo": 2.0}  # the default of beta, and of the losses that have another
AOT = "cdpo on sort(log pi(y+) - log pi(y-)) - sort(log ref(y+) - log ref(y-))"
F_ALPHA = "-ls(beta (g(a) - g(b))), g(r) = (exp((alpha-1) r) - 1) / (alpha-1)"
LD_DPO = "-ls(x), tokens after min(n+, n-) times alpha"
WPO, SQUARES = "-sg(w+ w-) ls(x), w = exp(mean_t (l_t - log sum_v p_v^2))", ("log_square_sum",)
SIMPO, CPO = "-ls(beta (p+/n+ - p-/n-) - gamma)", "-ls(beta (p+ - p-)) - alpha p+/n+"
ORPO = "-p+/n+ - lambda ls(o(p+/n+) - o(p-/n-)), o(p) = p - log(1 - exp(p))"
_SPECS = (
    spec_of(dpo.sigmoid, "-ls(x)", "arXiv 2305.18290 eq 7"),
    spec_of(dpo.cdpo, "-(1-eps) ls(x) - eps ls(-x)", "ericmitchell.ai/cdpo.pdf eq 3"),
    spec_of(dpo.robust, "(-(1-eps) ls(x) + eps ls(-x)) / (1-2 eps)", "arXiv 2403.00409"),
    spec_of(dpo.hinge, "max(0, 1 - x)", "arXiv 2305.10425"),
    spec_of(dpo.ipo, "(a/n+ - b/n- - 1/(2 beta))^2", "arXiv 2310.12036 eq 17", needs_lengths=True),
    spec_of(dpo.ipo_sum, "(d - 1/(2 beta))^2", "arXiv 2310.12036 eq 17"),
    spec_of(dpo.exo_pair, "s(x)(ls(x) - log(1-eps)) + s(-x)(ls(-x) - log eps)", "arXiv 2402.00856 eq 16"),
    spec_of(dpo.nca_pair, "-ls(beta a) - ls(-beta a)/2 - ls(-beta b)/2", "arXiv 2402.05369"),
    spec_of(dpo.bco_pair, "-ls(beta a) - ls(-beta b)", "arXiv 2404.04656"),
    spec_of(dpo.sppo_hard, "(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2", "arXiv 2405.00675 eq 4.7"),
    spec_of(dpo.aot, AOT, "arXiv 2406.05882", mixes_pairs=True),
    spec_of(dpo.aot_unpaired, "cdpo on sort(a) - sort(b)", "arXiv 2406.05882", mixes_pairs=True),
    spec_of(dpo.apo_zero, "1 - s(beta a) + s(beta b)", "arXiv 2408.06266 eq 7"),
    spec_of(dpo.apo_down, "s(beta a) + 1 - s(x)", "arXiv 2408.06266 eq 8"),
    spec_of(dpo.discopop, "-(1-m) ls(x) + m exp(-x), m = s(x/tau)", "arXiv 2406.08414 eq 5"),
    spec_of(dpo.sigmoid_norm, "-ls(beta (a/n+ - b/n-))", "arXiv 2411.15124 eq 6", needs_lengths=True),
    spec_of(dpo.dpop, "-ls(x - beta lambda max(0, -a))", "arXiv 2402.13228"),
    spec_of(dpo.rpo, "-ls(x) - alpha log pi(y+) / n+", "arXiv 2404.19733", needs_lengths=True),
    spec_of(modifiers.f_forward_kl, "-ls(beta (exp(-b) - exp(-a)))", "arXiv 2309.16240"),
    spec_of(modifiers.f_js, "-ls(beta (ls(a) - ls(b)))", "arXiv 2309.16240"),
    spec_of(modifiers.f_alpha, F_ALPHA, "arXiv 2309.16240"),
    spec_of(modifiers.ld_dpo, LD_DPO, "arXiv 2409.06411", needs_tokens=True),
    spec_of(modifiers.wpo, WPO, "arXiv 2406.11827 eq 2", needs_lengths=True, detaches=True, statistics=SQUARES),
    spec_of(modifiers.odpo, "-ls(x - alpha m)", "arXiv 2402.10571", needs_margin=True),
    spec_of(reference_free.simpo, SIMPO, "arXiv 2405.14734", reference_free=True, needs_lengths=True, averages=True),
    spec_of(reference_free.orpo, ORPO, "arXiv 2403.07691", reference_free=True, needs_lengths=True, averages=True),
    spec_of(reference_free.cpo, CPO, "arXiv 2401.08417", reference_free=True, needs_lengths=True),
    spec_of(reference_free.cpo_sum, "-ls(beta (p+ - p-)) - alpha p+", "arXiv 2401.08417", reference_free=True),
    spec_of(reference_free.nll, "-p+/n+", "maximum likelihood", reference_free=True, needs_lengths=True),
)

LOSSES: Mapping[str, LossSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})
BUILT_IN.update(LOSSES)


@dataclass(frozen=True)
class Hyperparameter:
    """A number that some losses read, besides beta and label_smoothing: its sign in formulas, and its range."""

    sign: str
    default: float
    low: float = 0.0
    high: float = math.inf
    ends: str = "[)"  # whether low and high are in the range

    def holds(self, value: float) -> bool:
        """Whether the range contains a value."""
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        return above and (value <= self.high if self.ends[1] == "]" else value < self.high)

    @property
    def range(self) -> str:
        """Such as "in [0, 1)"."""
        if self.high == math.inf:
            return f"finite and at least {self.low:g}"
        return f"in {self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"


HYPERPARAMETERS: Mapping[str, Hyperparameter] = MappingProxyType(
    {
        # above a tau of 1 the loss grows exponentially as x falls
        "discopop_tau": Hyperparameter("tau", 0.05, high=1.0, ends="(]"),
        "dpop_lambda": Hyperparameter("lambda", 50.0),
        "rpo_alpha": Hyperparameter("alpha", 1.0),
        "f_alpha": Hyperparameter("alpha", 0.5, high=1.0),
        "ld_alpha": Hyperparameter("alpha", 0.5, high=1.0, ends="[]"),
        "odpo_alpha": Hyperparameter("alpha", 1.0),
        "simpo_gamma": Hyperparameter("gamma", 1.0),
        "orpo_lambda": Hyperparameter("lambda", 0.1),
        "cpo_alpha": Hyperparameter("alpha", 1.0),
    }
)


def loss_spec(loss_type: str) -> LossSpec:
    """The preference loss of a name: built in, a user's own, or a weighted sum ("0.8*sigmoid + 0.2*bco_pair").

    Raises ValueError for an unknown one.
    """
    return modifiers.mixture(loss_type, loss_spec) if set("+*") & set(loss_type) else find(loss_type, LOSSES)


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    loss_type: str = "sigmoid",
    beta: float | None = None,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    **hyperparameters: float | None,
) -> DPOOutput:
    """Loss and rewards of P preference pairs; the formulas are in `dpo`, `modifiers` and `reference_free`.

    Args:
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: (P,) log-probability of each completion
            under policy and reference, summed over its tokens; any floating dtype, upcast to fp32 at least.
        loss_type: a key of `LOSSES`, or a weighted sum of them such as "0.8*sigmoid + 0.2*bco_pair".
        beta: the KL temperature, finite and above 0; None means 0.1, for `simpo` 2.
        label_smoothing: share of flipped labels, in [0, 0.5). `exo_pair` needs it above 0.
        chosen_lengths, rejected_lengths: (P,) tokens in each completion, for losses with `needs_lengths`.
        **hyperparameters: see `HYPERPARAMETERS`; None means the default in the loss's signature.

    Returns:
        `DPOOutput`. `losses` are per pair, in order (`aot` and `aot_unpaired`: per quantile of the batch).

    Raises:
        ValueError: unknown loss, a hyper-parameter that this loss does not use or out of range, missing lengths, or
            shapes that differ. Values of tensors are not checked: that would be a host sync.
    """
    loss = PreferenceLoss.of(loss_type, beta=beta, label_smoothing=label_smoothing, **hyperparameters)
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return loss(_pairs(loss.spec, logps, chosen_lengths, rejected_lengths))


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss with its hyper-parameters."""

    spec: LossSpec
    beta: float
    settings: Mapping[str, float]  # keyword arguments of the loss function

    @classmethod
    def of(
        cls, loss_type: str, *, beta: float | None = None, label_smoothing: float = 0.0, **given: Any
    ) -> PreferenceLoss:
        """The loss of a name; None, and a label_smoothing of 0, count as not given. Raises ValueError as `dpo_loss`."""
        spec = loss_spec(loss_type)
        if beta not in (None, BETA) and "beta" not in spec.parameters and not spec.own:
            raise ValueError(f"loss_type {spec.name!r} does not use beta (got {beta:g})")
        beta = BETAS.get(spec.name, BETA) if beta is None else beta
        chosen = {name: value for name, value in given.items() if value is not None}
        smoothing = {"label_smoothing": label_smoothing}
        _check_parameters(spec, beta, label_smoothing, chosen | (smoothing if label_smoothing != 0 else {}))
        values = {"beta": beta, **smoothing, **chosen}
        return cls(spec, beta, {name: values[name] for name in spec.parameters if name in values})

    def __call__(self, pairs: PairLogps) -> DPOOutput:
        """Loss and rewards of P pairs."""
        losses, metrics = self.spec(pairs, self.settings)
        counts = reward_counts(self.spec, pairs)
        chosen_rewards = self.beta * pairs.chosen_logratios.detach() / counts[0]
        rejected_rewards = self.beta * pairs.rejected_logratios.detach() / counts[1]
        return DPOOutput(losses, chosen_rewards, rejected_rewards, chosen_rewards - rejected_rewards, metrics)


def reward_counts(spec: LossSpec, pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """What the sums of chosen and rejected completions are divided by in their rewards: tokens (P,), or ones."""
    return token_counts(pairs) if spec.averages else (torch.ones_like(pairs.chosen_logps),) * 2


def _check_parameters(spec: LossSpec, beta: float, label_smoothing: float, given: Mapping[str, float]) -> None:
    for name, value in given.items():
        if name not in spec.parameters:
            users = ", ".join(repr(other.name) for other in LOSSES.values() if name in other.parameters) or "no loss"
            smoothed_dpo = name == "label_smoothing" and spec.name == "sigmoid"
            hint = "; DPO with label smoothing is 'cdpo'" if smoothed_dpo else ""
            raise ValueError(f"loss_type {spec.name!r} does not use {name} (got {value}); used by {users}{hint}")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be finite and above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is a share of flipped labels and must be in [0, 0.5), got {label_smoothing}")
    if spec.name == "exo_pair" and label_smoothing == 0:
        raise ValueError("loss_type 'exo_pair' takes log(label_smoothing) and needs it above 0: try 0.001, as TRL does")
    for name in HYPERPARAMETERS.keys() & given.keys():
        if not HYPERPARAMETERS[name].holds(given[name]):
            raise ValueError(f"{name} must be {HYPERPARAMETERS[name].range}, got {given[name]}")


def _pairs(
    spec: LossSpec, logps: tuple[Tensor, ...], chosen_lengths: Tensor | None, rejected_lengths: Tensor | None
) -> PairLogps:
    if spec.needs_lengths and (chosen_lengths is None or rejected_lengths is None):
        raise ValueError(f"loss_type {spec.name!r} averages over tokens: pass chosen_lengths and rejected_lengths")
    tensors = [*logps, *(lengths for lengths in (chosen_lengths, rejected_lengths) if lengths is not None)]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1:
        raise ValueError(f"log-probabilities and lengths must all be (P,), got {', '.join(map(str, shapes))}")
    dtype = torch.float64 if torch.float64 in {tensor.dtype for tensor in logps} else torch.float32
    chosen, rejected, ref_chosen, ref_rejected = (tensor.to(dtype) for tensor in logps)
    return PairLogps(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)

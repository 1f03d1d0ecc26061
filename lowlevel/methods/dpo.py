"""Direct Preference Optimization (arXiv 2305.18290); the reference is the policy without the trained adapter.

L = -log sigmoid( beta * [ (log pi(y+) - log ref(y+)) - (log pi(y-) - log ref(y-)) ] )        (eq. 7)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.batch.packing import ExampleLayout
from lowlevel.batch.segments import Segment, pair_segments
from lowlevel.config.offline import DPOConfig
from lowlevel.data.examples import PreferenceExample
from lowlevel.losses import DPOOutput, LossSums, PairLogps, PreferenceLoss, loss_spec
from lowlevel.losses.dpo_table import HYPERPARAMETERS, reward_counts
from lowlevel.losses.modifiers import rated_margins
from lowlevel.losses.registry import LossSpec, check_result
from lowlevel.losses.reward import ranked
from lowlevel.model.policy import Policy


@dataclass(frozen=True)
class DPO(ExampleLayout):
    """The DPO method. With packing, the prompt of a pair is computed once."""

    config: DPOConfig
    name: ClassVar[str] = "dpo"
    unit: ClassVar[str] = "pairs"
    paired: ClassVar[bool] = True

    def loss(self, policy: Policy, batch: PackedBatch) -> LossSums:
        """The preference loss, summed over the batch's pairs."""
        reference = self.reference_logps(policy, batch)  # (N,) fp32
        if self.config.disable_dropout:
            policy.dropout.disable()
        token_logps, statistics = policy.token_scores(batch, self.statistics)  # (N,) fp32 each
        pairs = pair_logps(batch, token_logps, reference, self.columns, statistics)  # sums over a completion, (P,) each
        output = self.preference_loss(pairs)  # eq. 7: -logsigmoid(beta * pairs.deltas)
        return _pair_sums(batch, pairs, output, self.spec.reference_free)

    @cached_property
    def preference_loss(self) -> PreferenceLoss:
        """The loss of `dpo.loss_type`, with its hyper-parameters."""
        return preference_loss(self.config)

    def reference_logps(self, policy: Policy, batch: PackedBatch) -> Tensor | None:
        """Log-probabilities (N,) fp32: 0 for a reference-free loss, None if a cache has given their sums."""
        if self.spec.reference_free:
            return torch.zeros_like(batch.scored_targets, dtype=torch.float32)
        return None if batch.reference_logps is not None else reference_token_logps(policy, batch)

    @property
    def spec(self) -> LossSpec:
        """The configured loss."""
        return self.preference_loss.spec

    @property
    def settings(self) -> Mapping[str, float]:
        """The hyper-parameters that it reads."""
        return self.preference_loss.settings

    @property
    def statistics(self) -> tuple[str, ...]:
        """Statistics of the vocabulary that it reads."""
        return self.spec.statistics

    def losses(self, logps: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        return self.preference_loss(logps).losses

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return not self.spec.reference_free

    def size(self, example: PreferenceExample) -> int:
        """Positions of a pair with its prompt shared."""
        return len(example.prompt_ids) - 1 + len(example.chosen_ids) + len(example.rejected_ids)

    def segments(self, example: PreferenceExample, number: int) -> list[Segment]:
        """With packing one with a shared prompt, else two plain sequences."""
        return pair_segments(example, number, shared=self.packing)


def reference_token_logps(policy: Policy, batch: PackedBatch) -> Tensor:
    """Log-probability of each scored token under the reference, (N,) fp32: no dropout, no gradient."""
    with policy.reference():  # the same batch, layout and kernels: equal weights give equal bits
        return policy.token_logps(batch)


def pair_logps(
    batch: PackedBatch,
    token_logps: Tensor,
    ref_token_logps: Tensor | None,
    columns: Sequence[str] = (),
    statistics: Mapping[str, Tensor] = MappingProxyType({}),
) -> PairLogps:
    """The input of a preference loss: the (N,) log-probabilities, summed by completion.

    `ref_token_logps` is None if the reference cache has given the batch its sums; `statistics` as in `PairLogps`.
    """
    ref_logps = batch.reference_logps if ref_token_logps is None else batch.sequence_sums(ref_token_logps)
    assert ref_logps is not None
    sums, tokens = (batch.sequence_sums(token_logps), ref_logps), (token_logps, ref_token_logps)
    return replace(_pair_logps(batch, sums, tokens, columns), statistics=statistics)


def kept_pair_logps(batch: PackedBatch, sums: LossSums, columns: Sequence[str] = ()) -> PairLogps:
    """The same from the kept values of a micro-step, without a gradient."""
    kept = {side: torch.cat([sums.examples[f"logps/{side}{end}"] for end in ("chosen", "rejected")])
            for side in ("", "ref_")}  # fmt: skip
    tokens = dict(sums.tokens)
    logps = tokens.pop("logps"), tokens.pop("ref_logps", None)
    return replace(_pair_logps(batch, (kept[""], kept["ref_"]), logps, columns), statistics=tokens)


def _pair_logps(
    batch: PackedBatch, sums: tuple[Tensor, Tensor], tokens: tuple[Tensor, Tensor | None], columns: Sequence[str]
) -> PairLogps:
    """`sums` and `tokens`: log-probabilities of completions (2 P,) and tokens (N,), by the policy and the reference."""
    # A dummy pair gets -1 instead of its sums of 0, which can make a custom loss infinite (division, logarithm) and its
    # gradient NaN, although the loss is masked.
    real = batch.real.repeat(2)
    chosen, rejected = torch.where(real, sums[0], -1.0).chunk(2)
    ref_chosen, ref_rejected = torch.where(real, sums[1], -1.0).chunk(2)
    # One completion twice: one number twice, so the gradient is 0 and not rounding, which AdamW would make a step of.
    rejected, ref_rejected = (
        torch.where(batch.tied, first, second) for first, second in ((chosen, rejected), (ref_chosen, ref_rejected))
    )
    chosen_lengths, rejected_lengths = batch.lengths.chunk(2)
    return PairLogps(
        chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths,
        *tokens, batch.sequence_ids, values=batch.values(columns),
    )  # fmt: skip


def _pair_sums(batch: PackedBatch, pairs: PairLogps, output: DPOOutput, reference_free: bool) -> LossSums:
    """Sums of loss and metrics over the real pairs, and the values of each pair and token for a trace."""
    reference = {"logps/ref_chosen": pairs.ref_chosen_logps, "logps/ref_rejected": pairs.ref_rejected_logps}
    metrics = {
        "rewards/chosen": output.chosen_rewards,
        "rewards/rejected": output.rejected_rewards,
        "rewards/margins": output.margins,
        "rewards/accuracies": ranked(output.margins),
        "logps/chosen": pairs.chosen_logps.detach(),
        "logps/rejected": pairs.rejected_logps.detach(),
        **({} if reference_free else reference),
        **output.metrics,
    }
    tokens = {"logps": pairs.token_logps, "ref_logps": pairs.ref_token_logps, **pairs.statistics}
    return LossSums.over(batch.real, output.losses, metrics, {**reference, **metrics}, tokens)


def preference_loss(config: DPOConfig) -> PreferenceLoss:
    """The configured loss. Raises ValueError for an unknown one, or a hyper-parameter that it does not use."""
    if keys := sorted({"beta", "label_smoothing"} & config.loss_kwargs.keys()):
        raise ValueError(f"loss_type {config.loss_type!r}: {keys[0]} is a key of its own: not in loss_kwargs")
    given = {name: getattr(config, name) for name in HYPERPARAMETERS} | dict(config.loss_kwargs)
    return PreferenceLoss.of(config.loss_type, beta=config.beta, label_smoothing=config.label_smoothing, **given)


def check_loss(config: DPOConfig, columns: Sequence[str] = ()) -> None:
    """Raise ValueError as `preference_loss`, and for a custom loss that fails on a trial batch; needs no model."""
    loss = preference_loss(config)
    spec, cached = loss.spec, config.reference_cache is not None
    if cached and (spec.reference_free or spec.needs_tokens):
        why = "has no reference" if spec.reference_free else "reads the reference's single tokens"
        raise ValueError(f"loss_type {spec.name!r} {why}: leave out reference_cache, which holds sums of completions")
    if spec.reference_free and config.ref_model_sync_steps is not None:
        raise ValueError(f"loss_type {spec.name!r} has no reference that could move: leave out ref_model_sync_steps")
    if spec.needs_margin:
        rated_margins(dict.fromkeys(columns, torch.zeros(0)))
    if spec.own:
        ids = torch.tensor([0, 0, 1, 2, 3, 4, 4, 4, 5, 6])  # 3 pairs, a dummy
        lengths = torch.tensor([2, 1, 1, 1, 3, 1])
        tokens = torch.linspace(-0.5, -2.0, len(ids)).requires_grad_()
        chosen, rejected = torch.zeros(7).index_add(0, ids, tokens)[:6].chunk(2)
        sums = [chosen, rejected, chosen.detach() - 0.1, rejected.detach() + 0.2]
        statistics = dict.fromkeys(spec.statistics, torch.full((len(ids),), -1.0))
        pairs = PairLogps(sums[0], sums[1], sums[2], sums[3], lengths[:3], lengths[3:], tokens, tokens.detach(), ids,
                          values={name: torch.ones(3) for name in columns}, statistics=statistics)  # fmt: skip
        check_result(loss.spec, pairs, loss.settings, tokens, size=3)


def reward_slopes(config: DPOConfig, pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """Slopes of the summed loss in the chosen and in the rejected rewards, (P,) each, by autograd.

    A reward is beta times a log-ratio, or times its average (`LossSpec.averages`); for the sigmoid loss the slopes are
    -sigma(-x) and sigma(-x). `aot` sorts its pairs, which must be those of one micro-batch. NaN for a custom loss that
    depends on token log-probabilities.
    """
    inputs = {"chosen_logps": pairs.chosen_logps, "rejected_logps": pairs.rejected_logps}
    inputs |= {} if pairs.token_logps is None else {"token_logps": pairs.token_logps}
    leaves = {name: values.detach().clone().requires_grad_() for name, values in inputs.items()}
    with torch.enable_grad():
        losses = preference_loss(config)(replace(pairs, **leaves)).losses  # type: ignore[arg-type]
        chosen, rejected, *tokens = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    zero = torch.zeros_like(pairs.chosen_logps)  # of a completion that the loss does not read
    if any(slopes is not None for slopes in tokens):
        return zero + torch.nan, zero + torch.nan
    counts = reward_counts(loss_spec(config.loss_type), pairs)
    for_chosen, for_rejected = (
        zero if slopes is None else slopes * count / config.beta
        for slopes, count in zip((chosen, rejected), counts, strict=True)
    )
    return for_chosen, for_rejected

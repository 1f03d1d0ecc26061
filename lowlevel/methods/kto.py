"""Kahneman-Tversky Optimization (arXiv 2402.01306) of completions with a label; the loss is in losses/kto.py.

A step needs two kinds of micro-batches: its examples, and the same prompts with completions of other prompts. The loop
runs the second kind first, without a gradient, and gives its mean log-ratio to the first (`loop.with_baseline`). With
packing, completions of one prompt share it in both kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.batch.packing import Layout
from lowlevel.batch.replies import Reply, lay_out_replies, replies
from lowlevel.config.offline import KTOConfig
from lowlevel.data.examples import Example, SFTExample
from lowlevel.losses import LossSums
from lowlevel.losses.kto import KTO_LOSSES, LabelledLogps, mismatched
from lowlevel.losses.registry import LossSpec
from lowlevel.methods.dpo import reference_token_logps
from lowlevel.model.policy import Policy

BALANCED = (1.0, 4 / 3)  # desirable_weight n_desirable / (undesirable_weight n_undesirable), arXiv 2402.01306
COARSER = 4  # the last micro-batch of mismatched completions is padded to few sizes, each of which is captured


@dataclass(frozen=True)
class KTO(Layout):
    """The KTO method. Its examples are conversations with one scored reply, and the label in `values`."""

    config: KTOConfig
    columns: tuple[str, ...] = ("label",)  # 1 is desirable, 0 is not
    name: ClassVar[str] = "kto"
    unit: ClassVar[str] = "examples"
    has_reference: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = ()

    def loss(self, policy: Policy, batch: PackedBatch) -> LossSums:
        """The KTO loss, summed over the batch's examples; of mismatched completions, their summed log-ratio."""
        if batch.kl is None:
            return _summed_logratio(policy, batch)
        reference = reference_token_logps(policy, batch)
        if self.config.disable_dropout:
            policy.dropout.disable()
        token_logps = policy.token_logps(batch)  # (N,) fp32
        rows = labelled_logps(batch, token_logps, reference)  # sums over a completion, (P,) each
        losses = self.losses(rows)
        return _label_sums(batch, rows, losses, self.config.beta * rows.logratios.detach())

    @property
    def spec(self) -> LossSpec:
        """The KTO loss; there is no other."""
        return KTO_LOSSES["kto"]

    @cached_property
    def settings(self) -> Mapping[str, float]:
        """The loss's hyper-parameters."""
        return {name: getattr(self.config, name) for name in self.spec.parameters}

    def losses(self, logps: LabelledLogps) -> Tensor:
        """The loss of each example, (P,)."""
        return self.spec(logps, self.settings)[0]

    def micro_batches(self, examples: Sequence[SFTExample]) -> list[PackedBatch]:
        """The examples of one step in rows; the first micro-batch holds those of the mismatched completions."""
        made = lay_out_replies(examples, self)
        first, *others = (replace(batch, kl=torch.zeros(())) for batch, _ in made)
        coarse = self.shape and replace(self.shape, positions=COARSER * self.shape.positions)
        without = lay_out_replies(_distinct(self.mismatched(examples)), replace(self, shape=coarse))
        return [replace(first, mismatched=tuple(_baseline(batch) for batch, _ in without)), *others]

    def mismatched(self, examples: Sequence[SFTExample]) -> list[SFTExample]:
        """Each prompt with the completion of the next example that has another prompt, cut to the row's length."""
        found = replies(examples)
        return [self._joined(found[i], found[j]) for i, j in mismatched([reply.prompt for reply in found])]

    def _joined(self, one: Reply, other: Reply) -> SFTExample:
        example, source = one.example, other.example
        ids = np.concatenate([example.input_ids[: one.start], source.input_ids[other.start :]])
        labels = np.concatenate([example.labels[: one.start], source.labels[other.start :]])
        return replace(example, input_ids=ids[: self.row_length], labels=labels[: self.row_length])


def _distinct(examples: Sequence[SFTExample]) -> list[SFTExample]:
    """Equal ones once, with their number in place of the label: the rows of a pair have one mismatched completion."""
    found: dict[tuple[bytes, bytes], list[SFTExample]] = {}
    for example in examples:
        found.setdefault((example.input_ids.tobytes(), example.labels.tobytes()), []).append(example)
    return [replace(same[0], values=(float(len(same)),)) for same in found.values()]


def _baseline(batch: PackedBatch) -> PackedBatch:
    """A micro-batch of mismatched completions; `data_rows` has one as often as it stands in the mean."""
    times = batch.values(KTO.columns)["label"][: len(batch.data_rows)].int().numpy()
    return replace(batch, data_rows=tuple(np.repeat(batch.data_rows, times).tolist()))


def _summed_logratio(policy: Policy, batch: PackedBatch) -> LossSums:
    """The log-ratio of mismatched completions, each as often as it occurs: no gradient, no dropout."""
    reference = reference_token_logps(policy, batch)
    policy.dropout.disable()
    with torch.no_grad():
        logratios = batch.sequence_sums(policy.token_logps(batch) - reference)
    return LossSums((logratios * batch.values(KTO.columns)["label"]).sum(), {})


def labelled_logps(batch: PackedBatch, token_logps: Tensor, ref_token_logps: Tensor) -> LabelledLogps:
    """The input of the loss: the (N,) log-probabilities, summed by completion."""
    logps, ref_logps = map(batch.sequence_sums, (token_logps, ref_token_logps))
    assert batch.kl is not None
    desirable = batch.values(KTO.columns)["label"] > 0
    return LabelledLogps(logps, ref_logps, desirable, batch.kl, token_logps, ref_token_logps, batch.sequence_ids)


def _label_sums(batch: PackedBatch, rows: LabelledLogps, losses: Tensor, rewards: Tensor) -> LossSums:
    """Sums of loss and metrics over the real examples, those of each label apart; and the values of each."""
    logps, ref_logps = rows.logps.detach(), rows.ref_logps
    metrics = {"kl": rows.kl.expand_as(rewards)}
    for label, belongs in (("desirable", rows.desirable), ("undesirable", ~rows.desirable)):
        parts = {"share": torch.ones_like(rewards), "rewards": rewards, "logps": logps}
        metrics |= {f"{name}/{label}": torch.where(belongs, value, 0.0) for name, value in parts.items()}
        metrics |= {f"logps/ref_{label}": torch.where(belongs, ref_logps, 0.0)}
    examples = {"logps": logps, "ref_logps": ref_logps, "reward": rewards, "desirable": rows.desirable.float()}
    tokens = {"logps": rows.token_logps, "ref_logps": rows.ref_token_logps}
    return LossSums.over(batch.real, losses, metrics, examples, tokens)


def balance(examples: Sequence[Example], config: KTOConfig) -> str:
    """The number of examples with each label; if they are unbalanced, the range of a weight that balances them."""
    desirable = sum(example.values[0] > 0 for example in examples)
    undesirable = len(examples) - desirable
    counts = f"{desirable:,} desirable and {undesirable:,} undesirable completions"
    good, bad = config.desirable_weight * desirable, config.undesirable_weight * undesirable
    low, high = BALANCED
    if not good or not bad or low <= good / bad <= high:
        return counts
    name, count, ends = (
        ("undesirable_weight", undesirable, (good / high, good / low))
        if good > bad
        else ("desirable_weight", desirable, (bad * low, bad * high))
    )
    weights = " to ".join(f"{end / count:.3g}" for end in ends)
    return f"{counts}, weighted {good / bad:.2f} to 1; for 1:1 to 4:3, as the paper advises, set kto.{name} = {weights}"

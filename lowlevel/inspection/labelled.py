"""The records of an inspected kto step or row: a labelled completion, its tokens, and the path to its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.execution import Eager
from lowlevel.inspection.displacement import distribution
from lowlevel.inspection.lines import PathStep
from lowlevel.inspection.records import CompletionRecord, examples_by_row, places_of, tokens_at
from lowlevel.kernels import token_logps
from lowlevel.loop import with_baseline
from lowlevel.methods.kto import KTO, labelled_logps
from lowlevel.model.policy import Policy

if TYPE_CHECKING:
    from lowlevel.data.examples import SFTExample


@dataclass(frozen=True, repr=False)
class LabelledRecord:
    """A prompt and a completion with its label."""

    row: int
    where: str
    prompt_ids: Tensor  # (p,) int64
    completion: CompletionRecord  # contributions: to the reward; weight: -dL/d(reward), below 0 if undesirable
    desirable: bool
    kl: Tensor  # () fp32, mean log-ratio of the inspected examples' mismatched completions
    mismatched: int  # their number; 0 for a row alone
    loss: Tensor  # () fp32

    def __repr__(self) -> str:
        label = "desirable" if self.desirable else "undesirable"
        return f"LabelledRecord(row {self.row}: {label}, reward {self.completion.reward:+.4f}, loss {self.loss:.4f})"


@torch.no_grad()
def inspect_labelled(policy: Policy, method: KTO, examples: Sequence[SFTExample]) -> list[LabelledRecord]:
    """Labelled completions, in the given order; z0 is that of these examples. Raises ValueError for a repeated row."""
    by_row, found = examples_by_row(examples), dict[int, LabelledRecord]()
    batches = method.micro_batches(examples)
    number = sum(len(other.data_rows) for batch in batches for other in batch.mismatched)
    for batch in with_baseline(Eager(policy, method), batches):
        found |= {record.row: record for record in _records(policy, method, batch, by_row, number)}
    return [found[example.row] for example in examples]


def _records(
    policy: Policy, method: KTO, batch: PackedBatch, by_row: Mapping[int, SFTExample], mismatched: int
) -> list[LabelledRecord]:
    moved, beta = batch.to(policy.placement.device), method.config.beta
    with policy.reference():
        ref_logps = policy.token_logps(moved)
    policy.dropout.disable()
    predictions = policy.scored_hidden_states(moved), policy.lm_head_weight, moved.scored_targets
    logps, predicted = token_logps(*predictions), distribution(*predictions)
    rows = labelled_logps(moved, logps, ref_logps)
    with torch.enable_grad():
        leaf = rows.logps.detach().clone().requires_grad_()
        losses, _ = method.spec(replace(rows, logps=leaf), method.settings)
        (slopes,) = torch.autograd.grad(losses.sum(), leaf)
    weights, losses = -slopes.cpu() / beta, losses.detach().cpu()
    sums, ref_sums, desirable = rows.logps.cpu(), rows.ref_logps.cpu(), rows.desirable.cpu()
    logps, ref_logps, kl = logps.cpu(), ref_logps.cpu(), rows.kl.cpu()
    found = []
    for i, row in enumerate(batch.data_rows):
        index = places_of(batch, i)
        tokens, reference = tokens_at(batch, index, logps, predicted), ref_logps[index]
        completion = CompletionRecord(
            tokens=tokens,
            ref_token_logps=reference,
            contributions=beta * (tokens.logps - reference),
            logp=sums[i],
            ref_logp=ref_sums[i],
            reward=beta * (sums[i] - ref_sums[i]),
            weight=weights[i],
        )
        prompt = torch.as_tensor(by_row[row].input_ids[: int(tokens.positions[0])], dtype=torch.int64)
        label, where = bool(desirable[i]), by_row[row].where
        found.append(LabelledRecord(row, where, prompt, completion, label, kl, mismatched, losses[i]))
    return found


def labelled_path(record: LabelledRecord, method: KTO) -> list[PathStep]:
    """The quantities from log-probabilities to the loss, in order."""
    one, settings = record.completion, method.config
    sign, name = ("", "desirable") if record.desirable else ("−", "undesirable")
    weight = settings.desirable_weight if record.desirable else settings.undesirable_weight
    z0 = float(record.kl.clamp(min=0))
    steps: list[tuple[str, str, Tensor | float]] = [
        ("policy", "log π(y|x), sum over tokens", one.logp),
        ("reference", "log ref(y|x)", one.ref_logp),
        ("log-ratio r", "log π − log ref", one.logratio),
        ("reward", f"β r, β = {settings.beta:g}", one.reward),
        ("KL estimate", f"mean log-ratio of {record.mismatched} mismatched completions", record.kl),
        ("z₀", "max(0, KL estimate)", z0),
        ("x", "β (r − z₀)", settings.beta * (float(one.logratio) - z0)),
        ("weight", "−dL/d(reward)", one.weight),
        ("loss L", f"{weight:g} · σ({'−' if record.desirable else ''}x), {name}", record.loss),
    ]
    return [PathStep(name, text, pair=float(value)) for name, text, value in steps]

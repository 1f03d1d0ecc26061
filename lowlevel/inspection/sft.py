"""What an inspection shows of sft: each learned token of a conversation, and its share of the conversation's loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lowlevel.batch.layout import PackedBatch
from lowlevel.data.examples import SFTExample
from lowlevel.inspection.displacement import distribution
from lowlevel.inspection.example import WORDS, Example, ScoredBatch, View, in_order
from lowlevel.inspection.reading import formula
from lowlevel.kernels import token_scores
from lowlevel.methods.sft import SFT
from lowlevel.model.policy import Policy


@torch.no_grad()
def inspect_sft(policy: Policy, method: SFT, examples: Sequence[SFTExample]) -> list[Example]:
    """Conversations, in the given order."""
    made = in_order(examples, method.micro_batches, lambda batch, own: _of_batch(policy, method, batch, own))
    total = sum(x.loss for x in made) or 1.0
    return [replace(x, numbers={**x.numbers, "of the step": x.loss / total}) for x in made]


def _of_batch(policy: Policy, method: SFT, batch: PackedBatch, examples: Sequence[SFTExample]) -> list[Example]:
    policy.dropout.disable()
    moved = batch.to(policy.placement.device)
    predictions = policy.scored_hidden_states(moved), policy.lm_head_weight, moved.scored_targets
    logps, statistics = token_scores(*predictions, method.statistics)
    losses, metrics = method.token_losses(moved, logps, statistics)
    own = {"logp": logps, "loss": losses}  # first, and not a metric of this name
    columns = {name: column.cpu() for name, column in (own | dict(metrics) | own).items()}
    sums = batch.sequence_sums(columns["loss"])
    shares = columns["loss"] / torch.cat([torch.where(sums == 0, 1.0, sums), torch.ones(1)])[batch.sequence_ids]
    scored, found = ScoredBatch(batch, columns, distribution(*predictions)), []
    for i, x in enumerate(examples):
        text, index = scored.text(i, "conversation", ids=x.input_ids), scored.places(i)
        text = replace(text, columns={**text.columns, "share": shares[index]})
        numbers = {f"column/{name}": float(value[i]) for name, value in batch.values(method.columns).items()}
        numbers |= {"loss": float(sums[i]), "per token": float(sums[i]) / max(1, len(index))}
        count = len(index) if batch.token_weights is None else float(batch.token_weights[index].sum())
        found.append(Example(x.row, x.where, x.input_ids[: text.positions[0]], (text,), numbers, {}, count))
    return found


def view(method: SFT) -> View:
    """How an inspection of sft names its columns and steps."""
    return View(
        unit="example",
        tokens="learned token",
        formula=formula(method.spec) if method.spec.own else f"Σ {formula(method.spec)}",
        words={
            "logp": "log-probability of the token, given all before it",
            "loss": "of the token; for cross-entropy −log-probability, in nats",
            **WORDS,
            "share": "of the conversation's loss",
        },
        adds="loss",
        sums="loss",
        facts=("tokens", "loss", "per token", "of the step"),
    )

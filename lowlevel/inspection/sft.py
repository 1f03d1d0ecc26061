"""What an inspection shows of sft: each learned token of a conversation, and its share of the conversation's loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lowlevel.inspection.displacement import distribution
from lowlevel.inspection.example import WORDS, Example, Scored, View, named, numbered
from lowlevel.inspection.reading import formula
from lowlevel.kernels import token_scores
from lowlevel.methods.sft import SFT
from lowlevel.model.policy import Policy

if TYPE_CHECKING:
    from lowlevel.data.examples import SFTExample


@torch.no_grad()
def inspect_sft(policy: Policy, method: SFT, examples: Sequence[SFTExample]) -> list[Example]:
    """Conversations, in the given order."""
    found: dict[int, Example] = {}
    for batch in method.micro_batches(numbered(examples)):
        policy.dropout.disable()
        moved = batch.to(policy.placement.device)
        predictions = policy.scored_hidden_states(moved), policy.lm_head_weight, moved.scored_targets
        logps, statistics = token_scores(*predictions, method.statistics)
        losses, metrics = method.token_losses(moved, logps, statistics)
        columns = {"logp": logps, "loss": losses, **metrics}
        scored = Scored(batch, {name: column.cpu() for name, column in columns.items()}, distribution(*predictions))
        for place, number in enumerate(batch.data_rows):
            values = named(batch.values(method.columns), place)
            weights = None if batch.token_weights is None else batch.token_weights[scored.places(place)]
            found[number] = _example(scored, place, examples[number], values, weights)
    made = [found[place] for place in range(len(examples))]
    total = sum(one.numbers["loss"] for one in made) or 1.0
    return [replace(x, numbers={**x.numbers, "of the step": x.numbers["loss"] / total}) for x in made]


def _example(
    scored: Scored, place: int, example: SFTExample, values: dict[str, float], weights: torch.Tensor | None
) -> Example:
    text = scored.text(place, "conversation", {}, ids=example.input_ids)
    losses, n = text.columns["loss"], len(text.scored)
    loss = losses.sum()
    shares = losses / torch.where(loss == 0, 1.0, loss)
    text = replace(text, columns={**text.columns, "share": shares})
    numbers = {**values, "tokens": n, "loss": float(loss), "per token": float(loss) / max(1, n)}
    count = float(n if weights is None else weights.sum())
    prompt = text.ids[: text.positions[0]] if n else text.ids
    return Example(example.row, example.where, prompt, (text,), numbers, {}, count)


def view(method: SFT) -> View:
    """Of conversations."""
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

"""What an inspection shows of reward: the reward of each completion, which is read at its last token, and their loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lowlevel.batch.layout import PackedBatch
from lowlevel.inspection.example import Example, Scored, View, named, numbered
from lowlevel.inspection.reading import formula
from lowlevel.losses.modifiers import rated_margins
from lowlevel.methods.reward import Reward
from lowlevel.model.policy import Policy

if TYPE_CHECKING:
    from lowlevel.data.examples import PreferenceExample


def inspect_rewards(policy: Policy, method: Reward, examples: Sequence[PreferenceExample]) -> list[Example]:
    """Pairs, in the given order."""
    found: dict[int, Example] = {}
    for batch in method.micro_batches(numbered(examples)):
        own = [examples[number] for number in batch.data_rows]
        found |= zip(batch.data_rows, _of_batch(policy, method, batch, own), strict=True)
    return [found[place] for place in range(len(examples))]


def _of_batch(
    policy: Policy, method: Reward, batch: PackedBatch, examples: Sequence[PreferenceExample]
) -> list[Example]:
    policy.dropout.disable()
    moved, half = batch.to(policy.placement.device), len(batch.real)
    with torch.no_grad():
        rewards = policy.token_scores(moved)[0].cpu()  # (N,): one a sequence
    pairs = method.pair_rewards(batch, batch.sequence_sums(rewards))
    leaves = [side.clone().requires_grad_() for side in (pairs.chosen, pairs.rejected)]
    losses, _ = method.spec(replace(pairs, chosen=leaves[0], rejected=leaves[1]), method.settings)
    weights = -torch.cat(torch.autograd.grad(losses.sum(), leaves))
    signs = torch.cat([torch.ones(half), -torch.ones(half), torch.zeros(1)])[batch.sequence_ids]
    scored = Scored(batch, {"reward": rewards, "adds": signs * rewards}, None)
    centre = method.config.center_rewards_coefficient
    singles = {"margin": pairs.margins, **pairs.values}
    singles |= {"rated margin": rated_margins(pairs.values)} if pairs.values else {}
    singles |= {"centring": centre * (pairs.chosen + pairs.rejected) ** 2} if centre else {}
    singles["loss"] = losses.detach()
    both = {"reward": torch.cat([pairs.chosen, pairs.rejected]), "weight": weights}
    found = []
    for i, x in enumerate(examples):
        prompt = torch.as_tensor(x.prompt_ids, dtype=torch.int64)
        sides = [("chosen", i, x.chosen_ids), ("rejected", half + i, x.rejected_ids)]
        texts = tuple(
            scored.text(at, name, {"tokens": len(ids), **named(both, at)}, ids=ids, start=len(prompt))
            for name, at, ids in sides
        )
        found.append(Example(x.row, x.where, prompt, texts, named(singles, i), equation(method)))
    return found


def equation(method: Reward) -> dict[str, str]:
    """From the last tokens to the loss."""
    centre = method.config.center_rewards_coefficient
    return {
        "tokens": "of the completion",
        "reward": "r = w · h of the last token",
        "margin": "r₊ − r₋",
        **dict.fromkeys(method.columns, "column of the row"),
        "rated margin": "m, subtracted from the margin",
        "centring": f"{centre:g} (r₊ + r₋)²",
        "weight": "−dL/dr",
        "loss": "−log σ(r₊ − r₋ − m) + centring",
    }


def view(method: Reward) -> View:
    """Of pairs."""
    return View(
        unit="pair",
        tokens="",
        formula=formula(method.spec),
        words={
            "reward": "of the completion, read at its last token: there is none of the tokens before",
            "adds": "what it adds to the margin: the reward; of the rejected, its negative",
        },
        adds="adds",
        sums="margin",
        facts=("margin", "weight", "loss"),
        more=("tokens", "reward"),
        measure="margin",
        caption="Margins of {} pairs, one square each. Blue: the chosen completion has the higher reward; orange: the "
        "lower.",
        colours=("adds",),
        symbols="σ: sigmoid; w: the reward head; h: the last hidden state; r₊, r₋: rewards of chosen and rejected; m: "
        "rated margin, 0 without one",
    )

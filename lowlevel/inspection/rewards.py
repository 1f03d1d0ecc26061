"""What an inspection shows of reward: the reward of each completion, read at its last token, and their loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lowlevel.batch.layout import PackedBatch
from lowlevel.data.examples import PreferenceExample
from lowlevel.inspection.example import Example, ScoredBatch, Step, View, example_of, in_order
from lowlevel.inspection.reading import formula
from lowlevel.losses.modifiers import rated_margins
from lowlevel.methods.reward import Reward
from lowlevel.model.policy import Policy


def inspect_rewards(policy: Policy, method: Reward, examples: Sequence[PreferenceExample]) -> list[Example]:
    """Pairs, in the given order."""
    return in_order(examples, method.micro_batches, lambda batch, own: _of_batch(policy, method, batch, own))


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
    scored = ScoredBatch(batch, {"reward": rewards, "adds": signs * rewards}, None)
    centre = method.config.center_rewards_coefficient
    steps: list[Step] = [
        ("reward", "r = w · h of the last token", torch.cat([pairs.chosen, pairs.rejected])),
        ("margin", "r₊ − r₋", pairs.margins),
        *((f"column/{name}", "of the row", values) for name, values in pairs.values.items()),
        *([("rated margin", "m, subtracted from the margin", rated_margins(pairs.values))] if pairs.values else []),
        *([("centring", f"{centre:g} (r₊ + r₋)²", centre * (pairs.chosen + pairs.rejected) ** 2)] if centre else []),
        ("weight", "−dL/dr", weights),
        ("loss", "−log σ(r₊ − r₋ − m) + centring", losses.detach()),
    ]
    found = []
    for i, x in enumerate(examples):
        sides = [(i, "chosen", x.chosen_ids), (half + i, "rejected", x.rejected_ids)]
        texts = [scored.text(at, name, ids=ids, start=len(x.prompt_ids)) for at, name, ids in sides]
        found.append(example_of(x, x.prompt_ids, texts, steps, i, half))
    return found


def view(method: Reward) -> View:
    """How an inspection of a reward model names its columns and steps."""
    return View(
        unit="pair",
        formula=formula(method.spec),
        words={
            "reward": "of the completion, read at its last token: there is none of the tokens before",
            "adds": "what it adds to the margin: the reward; of the rejected, its negative",
        },
        sums="margin",
        facts=("margin", "weight", "loss"),
        more=("tokens", "reward"),
        measure="margin",
        caption="Margins of {} pairs, one square each. Blue: the chosen completion has the higher reward; orange: the "
        "lower.",
        symbols="σ: sigmoid; w: the reward head; h: the last hidden state; r₊, r₋: rewards of chosen and rejected; m: "
        "rated margin, 0 without one",
    )

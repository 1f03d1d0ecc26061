"""The records of an inspected reward step or row: a pair, both rewards, and the path to its loss.

Nothing here is by token: a reward is one product, at the last token of its completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowlevel.inspection.records import PathStep, examples_by_row
from lowlevel.losses.modifiers import rated_margins
from lowlevel.methods.reward import Reward
from lowlevel.model.policy import Policy

if TYPE_CHECKING:
    from lowlevel.data.examples import PreferenceExample


@dataclass(frozen=True, repr=False)
class RewardRecord:
    """A pair of a reward model, on the CPU."""

    row: int
    where: str
    prompt_ids: Tensor  # (p,) int64
    chosen_ids: Tensor  # (n,) int64
    rejected_ids: Tensor
    chosen: Tensor  # () fp32, reward
    rejected: Tensor  # () fp32
    rated: Tensor | None  # () fp32, the rated margin; None without data.columns
    weights: tuple[float, float]  # -dL/d(reward) of chosen and rejected
    loss: Tensor  # () fp32
    values: Mapping[str, float]  # data.columns of the row

    def __repr__(self) -> str:
        rewards = f"rewards {float(self.chosen):+.4f} and {float(self.rejected):+.4f}"
        return f"RewardRecord(row {self.row}: {rewards}, loss {float(self.loss):.4f})"

    @property
    def margin(self) -> Tensor:
        """Chosen reward minus rejected reward, ()."""
        return self.chosen - self.rejected


def inspect_rewards(policy: Policy, method: Reward, examples: Sequence[PreferenceExample]) -> list[RewardRecord]:
    """The pairs of a reward model, in the given order. Raises ValueError if two come from one data row."""
    by_row, found = examples_by_row(examples), dict[int, RewardRecord]()
    for batch in method.micro_batches(examples):
        policy.dropout.disable()
        moved = batch.to(policy.placement.device)
        with torch.no_grad():
            pairs = method.pair_rewards(moved, policy.rewards(moved))
        leaves = [side.clone().requires_grad_() for side in (pairs.chosen, pairs.rejected)]
        losses, _ = method.spec(replace(pairs, chosen=leaves[0], rejected=leaves[1]), method.settings)
        slopes = [slope.cpu() for slope in torch.autograd.grad(losses.sum(), leaves)]
        rated = rated_margins(pairs.values).cpu() if pairs.values else None
        chosen, rejected, losses = (values.detach().cpu() for values in (pairs.chosen, pairs.rejected, losses))
        for i, row in enumerate(batch.data_rows):
            example = by_row[row]
            found[row] = RewardRecord(
                row=row,
                where=example.where,
                prompt_ids=torch.as_tensor(example.prompt_ids, dtype=torch.int64),
                chosen_ids=torch.as_tensor(example.chosen_ids, dtype=torch.int64),
                rejected_ids=torch.as_tensor(example.rejected_ids, dtype=torch.int64),
                chosen=chosen[i],
                rejected=rejected[i],
                rated=None if rated is None else rated[i],
                weights=(-float(slopes[0][i]), -float(slopes[1][i])),
                loss=losses[i],
                values={name: float(value[i]) for name, value in batch.values(method.columns).items()},
            )
    return [found[example.row] for example in examples]


def reward_path(record: RewardRecord, method: Reward) -> list[PathStep]:
    """The quantities from the last tokens to the loss, in order."""
    margin, centre = float(record.margin), method.config.center_rewards_coefficient
    rated = 0.0 if record.rated is None else float(record.rated)
    ends = [ids[-1] for ids in (record.chosen_ids, record.rejected_ids)]
    steps = [
        PathStep("tokens", "of the completion", float(len(record.chosen_ids)), float(len(record.rejected_ids))),
        PathStep("last token", "id, where the head reads", *map(float, ends)),
        PathStep("reward r", "w · h of the last token", float(record.chosen), float(record.rejected)),
        PathStep("margin", "r₊ − r₋", pair=margin),
    ]
    steps += [PathStep(name, "column of the row", pair=value) for name, value in record.values.items()]
    steps += [PathStep("rated margin m", "subtracted from the margin", pair=rated)] if record.values else []
    if centre:
        total = float(record.chosen + record.rejected)
        steps.append(PathStep("centring", f"{centre:g} (r₊ + r₋)²", pair=centre * total**2))
    return [
        *steps,
        PathStep("weight", "−dL/dr", *record.weights),
        PathStep("loss L", "−log σ(r₊ − r₋ − m) + centring", pair=float(record.loss)),
    ]

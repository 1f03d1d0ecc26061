"""The records of inspected kto and reward examples, and the path to their loss.

kto       a labelled completion and its tokens
reward    a pair and both rewards; nothing is by token: a reward is one product, at the last token of its completion
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.data.examples import PreferenceExample, SFTExample
from lowlevel.execution import Eager
from lowlevel.inspection.displacement import distribution
from lowlevel.inspection.records import CompletionRecord, PathStep, completions, examples_by_row
from lowlevel.kernels import token_logps
from lowlevel.loop import with_baseline
from lowlevel.losses.modifiers import rated_margins
from lowlevel.methods.kto import KTO, labelled_logps
from lowlevel.methods.reward import Reward
from lowlevel.model.policy import Policy


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
        return (
            f"LabelledRecord(row {self.row}: {self.label}, reward {self.completion.reward:+.4f}, loss {self.loss:.4f})"
        )

    @property
    def label(self) -> str:
        """In words."""
        return "desirable" if self.desirable else "undesirable"

    @property
    def sides(self) -> list[tuple[str, CompletionRecord, slice]]:
        """The completion, as `PairRecord.sides` has two."""
        return [(self.label, self.completion, slice(None))]

    @property
    def running_sums(self) -> Tensor:
        """Cumulative contributions, (n,) float64."""
        return self.completion.contributions.double().cumsum(0)


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
    scales = torch.full((len(batch.lengths),), beta)
    real, weights = range(len(batch.data_rows)), -slopes.cpu() / beta
    found = completions(batch, real, logps.cpu(), ref_logps.cpu(), predicted, scales, scales, weights)
    losses, desirable, kl = losses.detach().cpu(), rows.desirable.tolist(), rows.kl.cpu()
    records = []
    for i, row in enumerate(batch.data_rows):
        start = int(found[i].tokens.positions[0])
        prompt = torch.as_tensor(by_row[row].input_ids[:start], dtype=torch.int64)
        where = by_row[row].where
        records.append(LabelledRecord(row, where, prompt, found[i], desirable[i], kl, mismatched, losses[i]))
    return records


def labelled_path(record: LabelledRecord, method: KTO) -> list[PathStep]:
    """The quantities from log-probabilities to the loss, in order."""
    one, settings = record.completion, method.config
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
        ("loss L", f"{weight:g} · σ({'−' if record.desirable else ''}x), {record.label}", record.loss),
    ]
    return [PathStep(name, text, pair=float(value)) for name, text, value in steps]


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

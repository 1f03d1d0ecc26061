"""The records of an inspection: for each scored token and each pair, the numbers that make up the loss.

One forward pass of the policy, and for pairs one of the reference, with the functions of training:
`scored_hidden_states`, `token_logps`, and the configured loss. Dropout is off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.data.examples import PreferenceExample, SFTExample
from lowlevel.inspection.displacement import Displacement, Distribution, displacement_of, distribution
from lowlevel.inspection.reading import sum_name
from lowlevel.kernels import token_logps, token_scores
from lowlevel.methods.dpo import DPO, pair_logps, reward_slopes
from lowlevel.methods.sft import SFT
from lowlevel.model.policy import Policy


@dataclass(frozen=True)
class TokenRecord:
    """The n scored tokens of one sequence, in order, on the CPU."""

    ids: Tensor  # (n,) int64
    positions: Tensor  # (n,) int64, in the sequence (of a pair: prompt, then completion)
    logps: Tensor  # (n,) fp32, log-probability given all tokens before it
    predicted: Distribution  # of n predictions

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, repr=False)
class SequenceRecord:
    """An SFT example of L tokens, n of them learned."""

    row: int
    where: str
    input_ids: Tensor  # (L,) int64
    tokens: TokenRecord
    token_losses: Tensor  # (n,) fp32, of the configured loss; for cross-entropy in nats
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # (n,) each, of a custom loss
    values: Mapping[str, float] = field(default_factory=dict)  # data.columns of the row

    def __repr__(self) -> str:
        return f"SequenceRecord(row {self.row}: {len(self.tokens)} learned tokens, loss {float(self.loss):.4f})"

    @property
    def loss(self) -> Tensor:
        """Sum over the learned tokens, () fp32."""
        return self.token_losses.sum()

    @property
    def shares(self) -> Tensor:
        """Each token's share of this example's loss, (n,) fp32; they sum to 1, or are 0 if the loss is 0."""
        return self.token_losses / torch.where(self.loss == 0, 1.0, self.loss)


@dataclass(frozen=True)
class CompletionRecord:
    """One completion of a pair, n tokens, under policy and reference."""

    tokens: TokenRecord  # under the policy
    ref_token_logps: Tensor  # (n,) fp32
    contributions: Tensor  # (n,) fp32: to `PairRecord.argument`; beta * log-ratio, negative sign if rejected
    logp: Tensor  # () fp32, log pi(y | x)
    ref_logp: Tensor  # () fp32
    reward: Tensor  # () fp32, beta * (logp - ref_logp)
    weight: Tensor  # () fp32, -dL/d(sum of contributions); NaN for a custom loss that reads token log-probabilities

    @property
    def token_logratios(self) -> Tensor:
        """Policy minus reference, (n,) fp32."""
        return self.tokens.logps - self.ref_token_logps

    @property
    def logratio(self) -> Tensor:
        """Policy minus reference, () fp32."""
        return self.logp - self.ref_logp


@dataclass(frozen=True, repr=False)
class PairRecord:
    """A preference pair."""

    row: int
    where: str
    prompt_ids: Tensor  # (p,) int64
    chosen: CompletionRecord
    rejected: CompletionRecord
    argument: Tensor  # () fp32, sum of all contributions: the margin, or beta (a/n+ - b/n-) if the loss reads averages
    margin: Tensor  # () fp32, chosen reward minus rejected reward, as it is logged for every loss
    loss: Tensor  # () fp32; for `aot` that of the quantile with this pair's number
    displacement: Displacement | None  # None: the chosen completion is at least as likely as under the reference
    metrics: Mapping[str, Tensor]  # () each, of a custom loss
    values: Mapping[str, float]  # data.columns of the row

    def __repr__(self) -> str:
        tokens = f"{len(self.chosen.tokens)} chosen and {len(self.rejected.tokens)} rejected tokens"
        return f"PairRecord(row {self.row}: {tokens}, margin {float(self.margin):+.4f}, loss {float(self.loss):.4f})"

    @property
    def sides(self) -> list[tuple[str, CompletionRecord, slice]]:
        """Name and record of both completions, and the slice of `running_sums` that belongs to each."""
        split = len(self.chosen.tokens)
        return [("chosen", self.chosen, slice(0, split)), ("rejected", self.rejected, slice(split, None))]

    @property
    def running_sums(self) -> Tensor:
        """Cumulative contributions of chosen, then rejected tokens, (n+ + n-,) float64; the last is `argument`."""
        return torch.cat([self.chosen.contributions, self.rejected.contributions]).double().cumsum(0)


@dataclass(frozen=True)
class PathStep:
    """A quantity on the way to the loss: one number for each completion, or one for the pair."""

    name: str
    formula: str
    chosen: float | None = None
    rejected: float | None = None
    pair: float | None = None


@torch.no_grad()
def inspect_sequences(policy: Policy, method: SFT, examples: Sequence[SFTExample]) -> list[SequenceRecord]:
    """The learned tokens of SFT examples, in the given order. Raises ValueError if two come from one data row."""
    by_row, found = examples_by_row(examples), {}
    for batch in method.micro_batches(examples):
        policy.dropout.disable()
        moved = batch.to(policy.placement.device)
        predictions = policy.scored_hidden_states(moved), policy.lm_head_weight, moved.scored_targets
        logps, statistics = token_scores(*predictions, method.statistics)
        predicted = distribution(*predictions)
        losses, metrics = method.token_losses(moved, logps, statistics)
        values, metrics = batch.values(method.columns), {name: metric.cpu() for name, metric in metrics.items()}
        logps, losses = logps.cpu(), losses.cpu()
        for number, row in enumerate(batch.data_rows):
            index = places_of(batch, number)
            found[row] = SequenceRecord(
                row,
                by_row[row].where,
                torch.as_tensor(by_row[row].input_ids, dtype=torch.int64),
                tokens_at(batch, index, logps, predicted),
                losses[index],
                {name: metric[index] for name, metric in metrics.items()},
                {name: float(value[number]) for name, value in values.items()},
            )
    return [found[example.row] for example in examples]


@torch.no_grad()
def inspect_pairs(policy: Policy, method: DPO, examples: Sequence[PreferenceExample]) -> list[PairRecord]:
    """Preference pairs, in the given order. Micro-batches are those of training, because `aot` depends on them.

    Raises ValueError: two come from one data row.
    """
    by_row, found = examples_by_row(examples), dict[int, PairRecord]()
    for batch in method.micro_batches(examples):
        found |= {record.row: record for record in _pairs_of(policy, method, batch, by_row)}
    return [found[example.row] for example in examples]


def _pairs_of(
    policy: Policy, method: DPO, batch: PackedBatch, by_row: dict[int, PreferenceExample]
) -> list[PairRecord]:
    moved, head, config = batch.to(policy.placement.device), policy.lm_head_weight, method.config
    targets, needs = moved.scored_targets, method.statistics
    ref_hidden, ref_logps = None, torch.zeros_like(targets, dtype=torch.float32)
    if method.has_reference:
        with policy.reference():
            ref_hidden = policy.scored_hidden_states(moved)
            ref_logps = token_logps(ref_hidden, head, targets)
    policy.dropout.disable()
    hidden = policy.scored_hidden_states(moved)
    (logps, statistics), predicted = token_scores(hidden, head, targets, needs), distribution(hidden, head, targets)
    pairs = pair_logps(moved, logps, ref_logps, method.columns, statistics)
    output, slopes = method.preference_loss(pairs), reward_slopes(config, pairs)
    margins, losses = output.margins.cpu(), output.losses.cpu()
    metrics, values = {name: one.cpu() for name, one in output.metrics.items()}, batch.values(method.columns)
    # of both completions of each pair, (2P,): what its sum is divided by; all chosen, then all rejected
    averages, half = sum_name(config.loss_type) == "averaged margin", len(batch.real)
    counts = batch.lengths.clamp(min=1).float() if averages else torch.ones(2 * half)
    factors = config.beta / counts * torch.tensor([1.0, -1.0]).repeat_interleave(half)
    # a reward that rises by 1 raises an averaged contribution by 1 / n, unless the reward is the average
    own = counts if method.spec.averages else torch.ones_like(counts)
    weights = torch.cat([-slopes[0], slopes[1]]).cpu() * counts / own
    real = [i + start for i in range(len(batch.data_rows)) for start in (0, half)]
    sides = completions(batch, real, logps.cpu(), ref_logps.cpu(), predicted, config.beta / own, factors, weights)

    def displaced(i: int) -> Displacement | None:
        if ref_hidden is None or sides[i].logp >= sides[i].ref_logp:
            return None
        index = places_of(batch, i).to(hidden.device)
        return displacement_of(hidden[index], ref_hidden[index], head, targets[index])

    return [
        PairRecord(
            row=row,
            where=by_row[row].where,
            prompt_ids=torch.as_tensor(by_row[row].prompt_ids, dtype=torch.int64),
            chosen=sides[i],
            rejected=sides[half + i],
            argument=factors[i] * sides[i].logratio + factors[half + i] * sides[half + i].logratio,
            margin=margins[i],
            loss=losses[i],
            displacement=displaced(i),
            metrics={name: metric[i] for name, metric in metrics.items()},
            values={name: float(value[i]) for name, value in values.items()},
        )
        for i, row in enumerate(batch.data_rows)
    ]


def completions(
    batch: PackedBatch,
    sequences: Sequence[int],
    logps: Tensor,
    ref_logps: Tensor,
    predicted: Distribution,
    scales: Tensor,
    factors: Tensor,
    weights: Tensor,
) -> dict[int, CompletionRecord]:
    """The records of some of the S sequences of a batch, from the log-probabilities (N,) of its tokens; on the CPU.

    `scales` (S,): from a completion's log-ratio to its reward; `factors` (S,): from a token's to its contribution.
    """
    (sums, ref_sums), found = map(batch.sequence_sums, (logps, ref_logps)), {}
    for i in sequences:
        index = places_of(batch, i)
        tokens, reference = tokens_at(batch, index, logps, predicted), ref_logps[index]
        found[i] = CompletionRecord(
            tokens=tokens,
            ref_token_logps=reference,
            contributions=factors[i] * (tokens.logps - reference),
            logp=sums[i],
            ref_logp=ref_sums[i],
            reward=scales[i] * (sums[i] - ref_sums[i]),
            weight=weights[i],
        )
    return found


def tokens_at(batch: PackedBatch, index: Tensor, logps: Tensor, predicted: Distribution) -> TokenRecord:
    """The tokens at `index` among a batch's N scored ones; all on the CPU."""
    positions = batch.position_ids.flatten()[batch.scored_positions[index]] + 1  # a position predicts the next token
    return TokenRecord(batch.scored_targets[index], positions, logps[index], predicted.at(index))


def places_of(batch: PackedBatch, sequence: int) -> Tensor:
    """Places of a sequence's tokens among the N scored ones, (n,) int64."""
    return batch.sequence_index[sequence, : int(batch.lengths[sequence])]


def examples_by_row(examples: Sequence[Any]) -> dict[int, Any]:
    """Examples by data row. Raises ValueError if two come from one."""
    found = {example.row: example for example in examples}
    if len(found) < len(examples):
        raise ValueError(f"{len(examples)} examples come from {len(found)} data rows; inspect each row once")
    return found

"""What an inspection holds: for every scored token and every pair, the numbers that the loss is made of.

One forward pass of the policy, and for pairs one of the reference, through the functions that training uses:
`scored_hidden_states`, `token_logps`, `dpo_loss`. Dropout is off. Nothing here runs in a training step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.config.schema import DPOConfig
from lowlevel.inspection.displacement import Displacement, displacement_of
from lowlevel.inspection.distribution import Distribution, distribution
from lowlevel.inspection.reading import reading_of
from lowlevel.kernels import token_logps
from lowlevel.losses.preference import PairLogps
from lowlevel.methods.dpo import DPO, preference_loss, reward_slopes
from lowlevel.methods.sft import SFT
from lowlevel.model.policy import Policy

if TYPE_CHECKING:
    from lowlevel.data.examples import PreferenceExample, SFTExample


@dataclass(frozen=True)
class TokenRecord:
    """The n scored tokens of one sequence, in order, on the CPU."""

    ids: Tensor  # (n,) int64
    positions: Tensor  # (n,) int64, of the token in its sequence (in a pair: prompt, then completion)
    logps: Tensor  # (n,) fp32, log-probability given what stands before it
    predicted: Distribution  # of n predictions

    def __len__(self) -> int:
        """Scored tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class SequenceRecord:
    """An SFT example of L tokens, n of them learned."""

    row: int
    where: str
    input_ids: Tensor  # (L,) int64
    tokens: TokenRecord
    loss: Tensor  # () fp32, nats: the sum over the learned tokens

    @property
    def shares(self) -> Tensor:
        """Each token's share of this example's loss, (n,) fp32; they sum to 1."""
        return -self.tokens.logps / self.loss.clamp(min=torch.finfo(self.loss.dtype).tiny)


@dataclass(frozen=True)
class CompletionRecord:
    """One completion of a pair, n tokens, under policy and reference."""

    tokens: TokenRecord  # under the policy
    ref_token_logps: Tensor  # (n,) fp32
    contributions: Tensor  # (n,) fp32: to `PairRecord.argument`; beta * log-ratio, negative sign if rejected
    logp: Tensor  # () fp32, log pi(y | x)
    ref_logp: Tensor  # () fp32
    reward: Tensor  # () fp32, beta * (logp - ref_logp)
    weight: Tensor  # () fp32: one unit more of contributions lowers the loss at this rate

    @property
    def token_logratios(self) -> Tensor:
        """Policy minus reference, (n,) fp32."""
        return self.tokens.logps - self.ref_token_logps

    @property
    def logratio(self) -> Tensor:
        """Policy minus reference, () fp32."""
        return self.logp - self.ref_logp


@dataclass(frozen=True)
class PairRecord:
    """A preference pair.

    Attributes:
        argument: () fp32, what both completions' contributions add up to: the margin, or for a loss that reads
            averages, beta (a/n+ - b/n-).
        margin: () fp32, chosen reward minus rejected reward, as it is logged whatever the loss.
        loss: () fp32; for `aot` that of the quantile with this pair's number.
        displacement: which tokens took the chosen completion's probability, where it is less likely than under the
            reference; else None.
    """

    row: int
    where: str
    prompt_ids: Tensor  # (p,) int64
    chosen: CompletionRecord
    rejected: CompletionRecord
    argument: Tensor
    margin: Tensor
    loss: Tensor
    displacement: Displacement | None

    @property
    def running_sums(self) -> Tensor:
        """Contributions added up along chosen, then rejected, (n+ + n-,) float64; the last one is `argument`."""
        return torch.cat([self.chosen.contributions, self.rejected.contributions]).double().cumsum(0)


Record = SequenceRecord | PairRecord


@torch.no_grad()
def inspect_sequences(policy: Policy, method: SFT, examples: Sequence[SFTExample]) -> list[SequenceRecord]:
    """The learned tokens of SFT examples, in the order given. Raises ValueError where two come from one data row."""
    by_row, found = _by_row(examples), {}
    for batch in method.micro_batches(examples):
        policy.dropout.disable()
        moved = batch.to(policy.placement.device)
        logps, predicted = _predict(policy, policy.scored_hidden_states(moved), moved)
        for number, row in enumerate(batch.data_rows):
            tokens = _tokens(batch, _index(batch, number), logps.cpu(), predicted)
            ids = torch.as_tensor(by_row[row].input_ids, dtype=torch.int64)
            found[row] = SequenceRecord(row, by_row[row].where, ids, tokens, -tokens.logps.sum())
    return [found[example.row] for example in examples]


@torch.no_grad()
def inspect_pairs(policy: Policy, method: DPO, examples: Sequence[PreferenceExample]) -> list[PairRecord]:
    """Preference pairs, in the order given; micro-batches are those of training, which `aot` depends on.

    Raises:
        ValueError: two come from one data row.
    """
    by_row, found = _by_row(examples), {}
    for batch in method.micro_batches(examples):
        for record in _pairs_of(policy, method.config, batch, by_row):
            found[record.row] = record
    return [found[example.row] for example in examples]


def _pairs_of(
    policy: Policy, config: DPOConfig, batch: PackedBatch, by_row: dict[int, PreferenceExample]
) -> list[PairRecord]:
    moved = batch.to(policy.placement.device)
    with policy.reference():
        ref_hidden = policy.scored_hidden_states(moved)
        ref_logps = token_logps(ref_hidden, policy.lm_head_weight, moved.scored_targets)
    policy.dropout.disable()
    hidden = policy.scored_hidden_states(moved)
    logps, predicted = _predict(policy, hidden, moved)
    pairs, half = len(batch.data_rows), len(batch.lengths) // 2  # a batch filled up to a shape has room for more pairs
    sequences = torch.cat([torch.arange(pairs), half + torch.arange(pairs)])
    sums, ref_sums = (moved.sequence_sums(values).cpu()[sequences] for values in (logps, ref_logps))  # (2P,) each
    scored = _score(config, sums, ref_sums, batch.lengths[sequences])
    logps, ref_logps = logps.cpu(), ref_logps.cpu()

    def completion(i: int) -> CompletionRecord:
        index = _index(batch, int(sequences[i]))
        tokens, reference = _tokens(batch, index, logps, predicted), ref_logps[index]
        return CompletionRecord(
            tokens=tokens,
            ref_token_logps=reference,
            contributions=scored.factors[i] * (tokens.logps - reference),
            logp=sums[i],
            ref_logp=ref_sums[i],
            reward=config.beta * (sums[i] - ref_sums[i]),
            weight=scored.weights[i],
        )

    def displaced(i: int) -> Displacement | None:
        if sums[i] >= ref_sums[i]:
            return None
        index = _index(batch, int(sequences[i])).to(hidden.device)
        return displacement_of(hidden[index], ref_hidden[index], policy.lm_head_weight, moved.scored_targets[index])

    return [
        PairRecord(
            row,
            by_row[row].where,
            torch.as_tensor(by_row[row].prompt_ids, dtype=torch.int64),
            completion(i),
            completion(i + pairs),
            scored.arguments[i],
            scored.margins[i],
            scored.losses[i],
            displaced(i),
        )
        for i, row in enumerate(batch.data_rows)
    ]


@dataclass(frozen=True)
class _Scored:
    """P pairs, and their 2P completions: all chosen, then all rejected."""

    factors: Tensor  # (2P,) a token's contribution is this times its log-ratio
    weights: Tensor  # (2P,)
    arguments: Tensor  # (P,)
    margins: Tensor  # (P,)
    losses: Tensor  # (P,)


def _score(config: DPOConfig, logps: Tensor, ref_logps: Tensor, lengths: Tensor) -> _Scored:
    """The loss of P pairs from (2P,) log-probabilities, by `dpo_loss`, and its derivatives, by autograd through it.

    For the sigmoid loss both weights of a pair are sigma(-x), by which the pair's gradient is scaled. A reward that
    rises by 1 raises an averaged contribution by 1 / n: the weights of averages are n times those of rewards.
    """
    pairs = PairLogps(*logps.chunk(2), *ref_logps.chunk(2), *lengths.chunk(2))
    output, (for_chosen, for_rejected) = preference_loss(config)(pairs), reward_slopes(config, pairs)
    factors = contribution_factors(config, lengths)
    chosen, rejected = (factors * (logps - ref_logps)).chunk(2)
    weights = torch.cat([-for_chosen, for_rejected]) * _averaged_over(config, lengths)
    return _Scored(factors, weights, chosen + rejected, output.margins, output.losses)


def contribution_factors(config: DPOConfig, lengths: Tensor) -> Tensor:
    """What a token's log-ratio is multiplied by, by completion: beta, or beta / n where the loss reads averages.

    Args:
        config: the loss and beta.
        lengths: (2P,) int64, scored tokens; all chosen, then all rejected.

    Returns:
        (2P,) fp32, negative for the rejected.
    """
    chosen, rejected = (config.beta / _averaged_over(config, lengths)).chunk(2)
    return torch.cat([chosen, -rejected])


def _averaged_over(config: DPOConfig, lengths: Tensor) -> Tensor:
    """(2P,) fp32: n where the loss reads averages, else 1."""
    return lengths.clamp(min=1).float() if reading_of(config.loss_type) == "averages" else torch.ones(len(lengths))


def _predict(policy: Policy, hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, Distribution]:
    """Of (N, D): log-probabilities of the N scored tokens, (N,) fp32, and the predictions they come from."""
    logps = token_logps(hidden, policy.lm_head_weight, batch.scored_targets)
    return logps, distribution(hidden, policy.lm_head_weight, batch.scored_targets)


def _tokens(batch: PackedBatch, index: Tensor, logps: Tensor, predicted: Distribution) -> TokenRecord:
    """The tokens at `index` among a batch's N scored ones; all on the CPU."""
    positions = batch.position_ids.flatten()[batch.scored_positions[index]] + 1  # a position predicts the next token
    return TokenRecord(batch.scored_targets[index], positions, logps[index], predicted.at(index))


def _index(batch: PackedBatch, sequence: int) -> Tensor:
    """Where a sequence's tokens lie among the N scored ones, (n,) int64."""
    return batch.sequence_index[sequence, : int(batch.lengths[sequence])]


def _by_row(examples: Sequence[Any]) -> dict[int, Any]:
    found = {example.row: example for example in examples}
    if len(found) < len(examples):
        raise ValueError(f"{len(examples)} examples come from {len(found)} data rows; inspect each row once")
    return found

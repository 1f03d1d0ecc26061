"""The lines of an inspection's tables as text: one for each token, and one for each quantity of a pair."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowlevel.inspection.kto_and_reward import LabelledRecord, RewardRecord, labelled_path, reward_path
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.inspection.reading import formula, percent, plain, reading_of, signed
from lowlevel.inspection.records import CompletionRecord, PairRecord, PathStep, SequenceRecord, TokenRecord
from lowlevel.methods import DPO, KTO, Method, Reward


@dataclass(frozen=True)
class TokenLine:
    """One token as texts; `others` are the likeliest tokens besides it, each with its probability."""

    position: str
    token: str
    numbers: dict[str, str]
    others: tuple[str, ...]


@dataclass(frozen=True)
class FallLine:
    """The chosen token of a displaced pair that fell farthest, and the `gainers` with their probabilities."""

    fell: str  # nats lost by the whole chosen completion
    position: str
    token: str
    ref_logp: str
    logp: str
    gainers: tuple[tuple[str, str], ...]

    @property
    def sentence(self) -> str:
        """For a terminal."""
        gainers = ", ".join(f"{token} {change}" for token, change in self.gainers) or "no token in particular"
        return (
            f"displaced: the chosen is {self.fell} nats below its reference, most at {self.position} {self.token} "
            f"(log-probability {self.ref_logp} → {self.logp}); gained there: {gainers}"
        )


def sequence_lines(record: SequenceRecord, pieces: TokenPieces) -> list[TokenLine]:
    """The learned tokens of a conversation; log-probabilities in nats, shares of the conversation's loss.

    A loss other than cross-entropy adds columns: its values and metrics.
    """
    own = {} if torch.equal(record.token_losses, -record.tokens.logps) else {"loss": record.token_losses}
    own |= record.metrics
    columns = {
        "logp": map(plain, record.tokens.logps.tolist()),
        **_predictions(record.tokens),
        **{name: map(plain, values.tolist()) for name, values in own.items()},
        "share": map(percent, record.shares.tolist()),
    }
    return _lines(record.tokens, columns, pieces)


def completion_lines(side: CompletionRecord, running: Sequence[float], pieces: TokenPieces) -> list[TokenLine]:
    """The tokens of a completion; `running` is the sum of contributions after each."""
    columns = {
        "policy": map(plain, side.tokens.logps.tolist()),
        "reference": map(plain, side.ref_token_logps.tolist()),
        "log-ratio": map(signed, side.token_logratios.tolist()),
        "adds": map(signed, side.contributions.tolist()),
        "sum": map(signed, running),
        **_predictions(side.tokens),
    }
    return _lines(side.tokens, columns, pieces)


def fall_line(record: PairRecord, pieces: TokenPieces) -> FallLine | None:
    """None if the chosen completion is at least as likely as under the reference."""
    found, side = record.displacement, record.chosen
    if found is None:
        return None
    i = int(side.token_logratios.argmin())
    columns = (values[i].tolist() for values in (found.gainer_ids, found.gainer_ref_probs, found.gainer_probs))
    gainers = tuple(
        (pieces.text(token), f"{percent(before)} → {percent(after)}")
        for token, before, after in zip(*columns, strict=True)
        if after > before
    )
    return FallLine(
        fell=plain(-float(side.logratio)),
        position=str(int(side.tokens.positions[i])),
        token=pieces.text(int(side.tokens.ids[i])),
        ref_logp=plain(float(side.ref_token_logps[i])),
        logp=plain(float(side.tokens.logps[i])),
        gainers=gainers,
    )


def path_of(record: PairRecord | LabelledRecord | RewardRecord, method: Method) -> list[PathStep]:
    """The quantities from log-probabilities, or last tokens, to the loss, in order."""
    if isinstance(record, LabelledRecord):
        assert isinstance(method, KTO)
        return labelled_path(record, method)
    if isinstance(record, RewardRecord):
        assert isinstance(method, Reward)
        return reward_path(record, method)
    assert isinstance(method, DPO)
    return loss_path(record, method)


def loss_path(record: PairRecord, method: DPO) -> list[PathStep]:
    """The quantities of a pair."""
    chosen, rejected = record.chosen, record.rejected
    spec, reading = method.preference_loss.spec, reading_of(method.config.loss_type)
    reward = f"β · log-ratio{' / n' if spec.averages else ''}, β = {method.config.beta:g}"
    steps = [
        _both("policy", "log π(y|x), sum over tokens", chosen.logp, rejected.logp),
        _both("reference", "none: 0" if spec.reference_free else "log ref(y|x)", chosen.ref_logp, rejected.ref_logp),
        _both("log-ratio a, b", "log π − log ref", chosen.logratio, rejected.logratio),
        _both("reward", reward, chosen.reward, rejected.reward),
        PathStep("margin x", "chosen − rejected reward", pair=float(record.margin)),
    ]
    if reading == "averages" and not spec.averages:
        lengths = f"n₊ = {len(chosen.tokens)}, n₋ = {len(rejected.tokens)}"
        averaged = [completion.reward / max(1, len(completion.tokens)) for completion in (chosen, rejected)]
        steps.append(_both("reward per token", f"reward / n, {lengths}", *averaged))
        steps.append(PathStep("averaged margin", "β (a/n₊ − b/n₋)", pair=float(record.argument)))
    if reading in ("margin", "averages"):
        slope = "−dL/dx" if reading == "margin" else "−dL/d(averaged margin)"
        steps.append(PathStep("weight", "σ(−x)" if spec.name == "sigmoid" else slope, pair=float(chosen.weight)))
    else:
        slopes = "−dL/d(chosen reward), dL/d(rejected reward)"
        steps.append(_both("weight", slopes, chosen.weight, rejected.weight))
    quantile = " (of the micro-batch's quantile)" if reading == "quantiles" else ""
    read = [PathStep(name, "column of the row", pair=value) for name, value in record.values.items()]
    metrics = [PathStep(name, "metric of the loss", pair=float(value)) for name, value in record.metrics.items()]
    return [*steps, *read, PathStep("loss L", f"{formula(spec)}{quantile}", pair=float(record.loss)), *metrics]


def _both(name: str, text: str, chosen: Tensor, rejected: Tensor) -> PathStep:
    return PathStep(name, text, float(chosen), float(rejected))


def _predictions(tokens: TokenRecord) -> dict[str, Iterable[str]]:
    return {
        "prob": [percent(math.exp(logp)) for logp in tokens.logps.tolist()],
        "rank": map(str, tokens.predicted.ranks.tolist()),
        "entropy": [plain(entropy, 2) for entropy in tokens.predicted.entropies.tolist()],
    }


def _lines(tokens: TokenRecord, columns: Mapping[str, Iterable[str]], pieces: TokenPieces) -> list[TokenLine]:
    numbers = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    predicted = tokens.predicted
    others = [
        tuple(f"{text} {percent(share)}" for text, share in zip(pieces.texts(ids), shares, strict=True))
        for ids, shares in zip(predicted.alternative_ids, predicted.alternative_logps.exp().tolist(), strict=True)
    ]
    lines = zip(map(str, tokens.positions.tolist()), pieces.texts(tokens.ids), numbers, others, strict=True)
    return [TokenLine(*line) for line in lines]

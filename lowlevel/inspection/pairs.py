"""What an inspection shows of dpo and online_dpo: what each token adds to a pair's margin, and the way to the loss.

One forward pass of the policy and one of the reference, with the functions of training and its micro-batches, because
the loss `aot` depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.data.examples import PreferenceExample
from lowlevel.inspection.displacement import displacement_of, distribution
from lowlevel.inspection.example import WORDS, Example, ScoredBatch, Step, View, example_of, in_order, with_sums
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.inspection.reading import formula, percent, plain, reading_of
from lowlevel.kernels import token_logps, token_scores
from lowlevel.losses import PairLogps
from lowlevel.losses.registry import LossSpec
from lowlevel.methods.dpo import DPO, pair_logps, reward_slopes
from lowlevel.model.policy import Policy

COMPARED = {
    "policy": "log-probability of the token under the policy",
    "reference": "the same under the reference",
    "log-ratio": "policy − reference",
}


@torch.no_grad()
def inspect_pairs(policy: Policy, method: DPO, examples: Sequence[PreferenceExample]) -> list[Example]:
    """Preference pairs, in the given order."""
    return in_order(examples, method.micro_batches, lambda batch, own: _of_batch(policy, method, batch, own))


def _of_batch(policy: Policy, method: DPO, batch: PackedBatch, examples: Sequence[PreferenceExample]) -> list[Example]:
    moved, head, half = batch.to(policy.placement.device), policy.lm_head_weight, len(batch.real)
    targets = moved.scored_targets
    ref_hidden, ref_logps = None, torch.zeros_like(targets, dtype=torch.float32)
    if method.has_reference:
        with policy.reference():
            ref_hidden = policy.scored_hidden_states(moved)
            ref_logps = token_logps(ref_hidden, head, targets)
    policy.dropout.disable()
    hidden = policy.scored_hidden_states(moved)
    logps, statistics = token_scores(hidden, head, targets, method.statistics)
    pairs = pair_logps(moved, logps, ref_logps, method.columns, statistics)
    # of both completions of each pair, (2P,), all chosen, then all rejected: what its sum is divided by
    n = batch.lengths.clamp(min=1).float()
    factors = method.config.beta / (n if per_token(method.spec) else torch.ones(2 * half))
    factors[half:] *= -1
    columns = compared(logps, ref_logps)
    columns["adds"] = torch.cat([factors, torch.zeros(1)])[batch.sequence_ids] * columns["log-ratio"]
    columns["sum"] = columns["adds"]  # its place; see with_sums
    scored = ScoredBatch(batch, columns, distribution(hidden, head, targets))
    sums = {name: batch.sequence_sums(values) for name, values in columns.items()}
    steps, found = _steps(method, batch, pairs, sums), []
    for i, x in enumerate(examples):
        texts = with_sums([scored.text(i, "chosen"), scored.text(half + i, "rejected")], "adds")
        fall, index = None, scored.places(i).to(hidden.device)
        if ref_hidden is not None and sums["policy"][i] < sums["reference"][i]:
            fall = displacement_of(hidden[index], ref_hidden[index], head, targets[index])
        found.append(example_of(x, x.prompt_ids, texts, steps, i, half, displacement=fall))
    return found


def _steps(method: DPO, batch: PackedBatch, pairs: PairLogps, sums: Mapping[str, Tensor]) -> list[Step]:
    """From four log-probabilities to the loss: of each completion (2P,), or of each pair (P,)."""
    spec, beta, n, half = method.spec, method.config.beta, batch.lengths.clamp(min=1).float(), len(batch.real)
    reading, output = reading_of(spec.name), method.preference_loss(pairs)
    reward = beta * sums["log-ratio"] / (n if spec.averages else 1)
    weights = torch.cat(reward_slopes(method.config, pairs)).cpu() * (n if averaged(spec) else 1)
    weights[:half] *= -1
    slope = "−dL/d(averaged margin)" if averaged(spec) else "σ(−x)" if spec.name == "sigmoid" else "−dL/dx"
    single = reading in ("margin", "averages")  # the loss reads one number of a pair
    averages: list[Step] = [
        ("reward per token", "reward / n", reward / n),
        ("averaged margin", "β (a/n₊ − b/n₋)", sums["adds"].view(2, -1).sum(0)),
    ]
    return [
        ("tokens", "n₊, n₋", batch.lengths),
        ("policy", "log π(y|x), sum over tokens", sums["policy"]),
        ("reference", "none: 0" if spec.reference_free else "log ref(y|x)", sums["reference"]),
        ("log-ratio", "a, b = log π − log ref", sums["log-ratio"]),
        ("reward", f"β · log-ratio{' / n' * spec.averages}, β = {beta:g}", reward),
        ("margin", "x = chosen − rejected reward", output.margins),
        *(averages if averaged(spec) else []),
        ("weight", slope, weights[:half]) if single else ("weight", "−dL/d(reward), its negative if rejected", weights),
        *((f"column/{name}", "of the row", values) for name, values in batch.values(method.columns).items()),
        ("loss", f"{formula(spec)}{' (of the quantile of this number)' * (reading == 'quantiles')}", output.losses),
        *((f"metric/{name}", "of the loss", values) for name, values in output.metrics.items()),
    ]


def compared(logps: Tensor, ref_logps: Tensor) -> dict[str, Tensor]:
    """The columns of `COMPARED`, (N,) on the CPU."""
    logps, ref_logps = logps.cpu(), ref_logps.cpu()
    return {"policy": logps, "reference": ref_logps, "log-ratio": logps - ref_logps}


def per_token(spec: LossSpec) -> bool:
    """Whether a token counts less in a longer completion."""
    return spec.averages or reading_of(spec.name) == "averages"


def averaged(spec: LossSpec) -> bool:
    """Whether the loss reads averages of rewards that are sums."""
    return per_token(spec) and not spec.averages


def view(method: DPO) -> View:
    """How an inspection of dpo names its columns and steps."""
    sums = "averaged margin" if averaged(method.spec) else "margin"
    return View(
        unit="pair",
        formula=formula(method.spec),
        words={
            **COMPARED,
            "sampler": "the same as the policy sampled it",
            "adds": f"what it adds to the {sums}: β · log-ratio{' / n' * per_token(method.spec)}; − for the rejected",
            "sum": f"of all that was added so far; the last one is the {sums}",
            **WORDS,
        },
        sums=sums,
        facts=("margin", *(["averaged margin"] if averaged(method.spec) else []), "weight", "loss"),
        more=("tokens", "reward"),
        measure="margin",
        caption="Margins of {} pairs, one square each. Blue: the policy prefers the chosen completion more than the "
        "reference does; orange: less.",
        symbols="σ: sigmoid; x: margin; a, b: log-ratios of chosen and rejected; d = a − b; n₊, n₋: lengths",
    )


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


def fall_line(example: Example, pieces: TokenPieces) -> FallLine | None:
    """None if the chosen completion is at least as likely as under the reference."""
    found, text = example.displacement, example.texts[0]
    if found is None:
        return None
    i = int(text.columns["log-ratio"].argmin())
    columns = (values[i].tolist() for values in (found.gainer_ids, found.gainer_ref_probs, found.gainer_probs))
    gainers = tuple(
        (pieces.text(token), f"{percent(before)} → {percent(after)}")
        for token, before, after in zip(*columns, strict=True)
        if after > before
    )
    return FallLine(
        fell=plain(-text.numbers["log-ratio"]),
        position=str(text.positions[i]),
        token=pieces.text(int(text.token_ids[i])),
        ref_logp=plain(float(text.columns["reference"][i])),
        logp=plain(float(text.columns["policy"][i])),
        gainers=gainers,
    )

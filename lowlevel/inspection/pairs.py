"""What an inspection shows of dpo and online_dpo: what each token of a pair adds to the margin, and the way to the loss.

One forward pass of the policy and one of the reference, with the functions of training and its micro-batches, because
the loss `aot` depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowlevel.batch.layout import PackedBatch
from lowlevel.inspection.displacement import displacement_of, distribution
from lowlevel.inspection.example import WORDS, Example, Scored, Text, View, named, numbered, with_sums
from lowlevel.inspection.pieces import TokenPieces
from lowlevel.inspection.reading import formula, percent, plain, reading_of
from lowlevel.kernels import token_logps, token_scores
from lowlevel.losses.registry import LossSpec
from lowlevel.methods.dpo import DPO, pair_logps, reward_slopes
from lowlevel.model.policy import Policy

if TYPE_CHECKING:
    from lowlevel.data.examples import PreferenceExample

COMPARED = {
    "policy": "log-probability of the token under the policy",
    "reference": "the same under the reference",
    "log-ratio": "policy − reference",
}


@torch.no_grad()
def inspect_pairs(policy: Policy, method: DPO, examples: Sequence[PreferenceExample]) -> list[Example]:
    """Preference pairs, in the given order."""
    found: dict[int, Example] = {}
    for batch in method.micro_batches(numbered(examples)):
        own = [examples[number] for number in batch.data_rows]
        found |= zip(batch.data_rows, _of_batch(policy, method, batch, own), strict=True)
    return [found[place] for place in range(len(examples))]


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
    output, slopes = method.preference_loss(pairs), torch.cat(reward_slopes(method.config, pairs)).cpu()
    # of both completions of each pair, (2P,): what its sum is divided by; all chosen, then all rejected
    n, ones = batch.lengths.clamp(min=1).float(), torch.ones(2 * half)
    divided, sign = (n if per_token(method.spec) else ones), torch.tensor([1.0, -1.0]).repeat_interleave(half)
    of_reward = n if method.spec.averages else ones
    factors = torch.cat([method.config.beta / divided * sign, torch.zeros(1)])[batch.sequence_ids]
    columns = compared(logps, ref_logps)
    columns["adds"] = factors * columns["log-ratio"]
    scored = Scored(batch, columns, distribution(hidden, head, targets))
    sums = {name: batch.sequence_sums(columns[name]) for name in COMPARED}
    sums["reward"] = method.config.beta / of_reward * sums["log-ratio"]
    sums |= {"reward per token": sums["reward"] / n} if averaged(method.spec) else {}
    sums["weight"] = -sign * slopes * divided / of_reward  # a reward that rises by 1 raises an averaged sum by 1 / n
    singles = {**batch.values(method.columns), **output.metrics, "margin": output.margins, "loss": output.losses}
    found = []
    for i, example in enumerate(examples):
        sides = [scored.text(i + at, name, named(sums, i + at)) for name, at in (("chosen", 0), ("rejected", half))]
        fall, index = None, scored.places(i).to(hidden.device)
        if ref_hidden is not None and sums["policy"][i] < sums["reference"][i]:
            fall = displacement_of(hidden[index], ref_hidden[index], head, targets[index])
        pair = _example(example, with_sums(sides, "adds"), named(singles, i), method, list(output.metrics))
        found.append(replace(pair, displacement=fall))
    return found


def _example(
    x: PreferenceExample, texts: tuple[Text, ...], numbers: dict[str, float], method: DPO, metrics: Sequence[str]
) -> Example:
    """A pair; a loss that reads one number of it gives it one weight."""
    spec, reading, loss = method.spec, reading_of(method.spec.name), numbers.pop("loss")
    if averaged(spec):
        numbers["averaged margin"] = float(sum(text.columns["adds"].sum() for text in texts))
    if reading in ("margin", "averages"):
        numbers["weight"] = texts[0].numbers["weight"]
        texts = tuple(replace(one, numbers={k: v for k, v in one.numbers.items() if k != "weight"}) for one in texts)
    prompt = torch.as_tensor(x.prompt_ids, dtype=torch.int64)
    return Example(x.row, x.where, prompt, texts, {**numbers, "loss": loss}, equation(method, metrics))


def equation(method: DPO, metrics: Sequence[str] = ()) -> dict[str, str]:
    """From four log-probabilities to the loss."""
    spec, reading = method.spec, reading_of(method.spec.name)
    weights = {
        "margin": "σ(−x)" if spec.name == "sigmoid" else "−dL/dx",
        "averages": "−dL/dx" if spec.averages else "−dL/d(averaged margin)",
    }
    return {
        "tokens": "n₊, n₋",
        "policy": "log π(y|x), sum over tokens",
        "reference": "none: 0" if spec.reference_free else "log ref(y|x)",
        "log-ratio": "a, b = log π − log ref",
        "reward": f"β · log-ratio{' / n' * spec.averages}, β = {method.config.beta:g}",
        "margin": "x = chosen − rejected reward",
        **({"reward per token": "reward / n", "averaged margin": "β (a/n₊ − b/n₋)"} if averaged(spec) else {}),
        "weight": weights.get(reading, "−dL/d(chosen reward), dL/d(rejected reward)"),
        **dict.fromkeys(method.columns, "column of the row"),
        "loss": f"{formula(spec)}{' (of the quantile of this number)' * (reading == 'quantiles')}",
        **dict.fromkeys(metrics, "metric of the loss"),
    }


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
    """Of pairs."""
    sums = "averaged margin" if averaged(method.spec) else "margin"
    return View(
        unit="pair",
        tokens="",
        formula=formula(method.spec),
        words={
            **COMPARED,
            "sampler": "the same as the policy sampled it",
            "adds": f"what it adds to the {sums}: β · log-ratio{' / n' * per_token(method.spec)}; of the rejected, its negative",
            "sum": f"of all that was added so far; the last one is the {sums}",
            **WORDS,
        },
        adds="adds",
        sums=sums,
        facts=("margin", *(["averaged margin"] if averaged(method.spec) else []), "weight", "loss"),
        more=("tokens", "reward"),
        measure="margin",
        caption="Margins of {} pairs, one square each. Blue: the policy prefers the chosen completion more than the "
        "reference does; orange: less.",
        colours=("adds",),
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

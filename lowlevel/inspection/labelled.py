"""What an inspection shows of kto: a completion with its label, and z0 with the completion of another prompt for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lowlevel.batch.layout import PackedBatch
from lowlevel.config.offline import SFTConfig
from lowlevel.data.examples import SFTExample
from lowlevel.execution import Eager
from lowlevel.inspection.displacement import distribution
from lowlevel.inspection.example import WORDS, Example, ScoredBatch, Text, View, example_of, in_order, with_sums
from lowlevel.inspection.pairs import COMPARED, compared
from lowlevel.inspection.reading import formula
from lowlevel.kernels import token_logps
from lowlevel.loop import with_baseline
from lowlevel.methods.kto import KTO, labelled_logps
from lowlevel.methods.sft import SFT
from lowlevel.model.policy import Policy


@torch.no_grad()
def inspect_labelled(policy: Policy, method: KTO, examples: Sequence[SFTExample]) -> list[Example]:
    """Labelled completions, in the given order; z0 is that of these examples."""
    others = _mismatched(policy, method, [replace(x, row=place) for place, x in enumerate(examples)])
    found = in_order(
        examples,
        lambda rows: with_baseline(Eager(policy, method), method.micro_batches(rows)),
        lambda batch, own: _of_batch(policy, method, batch, own, len(others)),
    )
    return [replace(x, others=(others[i],) if i in others else ()) for i, x in enumerate(found)]


def _scored(policy: Policy, batch: PackedBatch, beta: float) -> ScoredBatch:
    moved = batch.to(policy.placement.device)
    with policy.reference():
        ref_logps = policy.token_logps(moved)
    policy.dropout.disable()
    predictions = policy.scored_hidden_states(moved), policy.lm_head_weight, moved.scored_targets
    columns = compared(token_logps(*predictions), ref_logps)
    columns["adds"] = columns["sum"] = beta * columns["log-ratio"]  # "sum": see with_sums
    return ScoredBatch(batch, columns, distribution(*predictions))


def _mismatched(policy: Policy, method: KTO, rows: Sequence[SFTExample]) -> dict[int, Text]:
    """The completions that z0 is estimated from, by the place of the example whose prompt each has."""
    plain, found = SFT(SFTConfig(), method.batch_size, method.row_length, packing=False), dict[int, Text]()
    for batch in plain.micro_batches(method.mismatched(rows)):
        scored = _scored(policy, batch, method.config.beta)
        ratios = batch.sequence_sums(scored.columns["log-ratio"])
        for place, number in enumerate(batch.data_rows):
            text = scored.text(place, "mismatched", "the completion of another prompt, for z₀")
            (text,) = with_sums([text], "adds")
            found[number] = replace(text, numbers={**text.numbers, "log-ratio": float(ratios[place])})
    return found


def _of_batch(
    policy: Policy, method: KTO, batch: PackedBatch, examples: Sequence[SFTExample], mismatched: int
) -> list[Example]:
    scored, beta, batch = _scored(policy, batch, method.config.beta), method.config.beta, batch.to(torch.device("cpu"))
    rows = labelled_logps(batch, scored.columns["policy"], scored.columns["reference"])
    with torch.enable_grad():
        leaf = rows.logps.detach().clone().requires_grad_()
        losses, _ = method.spec(replace(rows, logps=leaf), method.settings)
        (slopes,) = torch.autograd.grad(losses.sum(), leaf)
    ratios, z0 = rows.logratios, rows.kl.clamp(min=0)
    found = []
    for i, x in enumerate(examples):
        label, sign = ("desirable", "−") if rows.desirable[i] else ("undesirable", "")
        weight = method.settings[f"{label}_weight"]
        steps = [
            ("policy", "log π(y|x), sum over tokens", rows.logps),
            ("reference", "log ref(y|x)", rows.ref_logps),
            ("log-ratio", "r = log π − log ref", ratios),
            ("reward", f"β r, β = {beta:g}", beta * ratios),
            ("KL estimate", f"mean log-ratio of {mismatched} mismatched completions", rows.kl.expand_as(ratios)),
            ("z₀", "max(0, KL estimate)", z0.expand_as(ratios)),
            ("x", "β (r − z₀)", beta * (ratios - z0)),
            ("weight", "−dL/d(reward)", -slopes / beta),
            ("loss", f"{weight:g} · σ({sign}x), {label}", losses.detach()),
        ]
        text = scored.text(i, label)
        found.append(example_of(x, x.input_ids[: text.start], with_sums([text], "adds"), steps, i, len(ratios)))
    return found


def view(method: KTO) -> View:
    """How an inspection of kto names its columns and steps."""
    return View(
        unit="labelled completion",
        formula=formula(method.spec),
        words={
            **COMPARED,
            "adds": "what it adds to the reward: β · log-ratio",
            "sum": "of all that was added so far; the last one is the reward",
        }
        | WORDS,
        sums="reward",
        facts=("reward", "weight", "loss"),
        more=("tokens", "z₀"),
        measure="reward",
        caption="Rewards of {} completions, one square each. Blue: likelier than under the reference; orange: less "
        "likely.",
        by_text=True,
        symbols="σ: sigmoid; wD, wU: the weights of desirable and undesirable completions",
    )

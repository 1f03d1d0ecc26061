"""What an inspection shows of kto: a completion with its label, and z0 with the completion of another prompt for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lowlevel.batch.layout import PackedBatch
from lowlevel.execution import Eager
from lowlevel.inspection.displacement import distribution
from lowlevel.inspection.example import WORDS, Example, Scored, Text, View, named, numbered, with_sums
from lowlevel.inspection.pairs import COMPARED, compared
from lowlevel.inspection.reading import formula
from lowlevel.kernels import token_logps
from lowlevel.loop import with_baseline
from lowlevel.methods.kto import KTO, labelled_logps
from lowlevel.methods.sft import SFT
from lowlevel.model.policy import Policy

if TYPE_CHECKING:
    from lowlevel.data.examples import SFTExample


@torch.no_grad()
def inspect_labelled(policy: Policy, method: KTO, examples: Sequence[SFTExample]) -> list[Example]:
    """Labelled completions, in the given order; z0 is that of these examples."""
    rows, found = numbered(examples), dict[int, Example]()
    others = _mismatched(policy, method, rows)
    for batch in with_baseline(Eager(policy, method), method.micro_batches(rows)):
        own = [examples[number] for number in batch.data_rows]
        for number, one in zip(batch.data_rows, _of_batch(policy, method, batch, own, len(others)), strict=True):
            found[number] = replace(one, others=(others[number],) if number in others else ())
    return [found[place] for place in range(len(examples))]


def _scored(policy: Policy, batch: PackedBatch, beta: float) -> Scored:
    moved = batch.to(policy.placement.device)
    with policy.reference():
        ref_logps = policy.token_logps(moved)
    policy.dropout.disable()
    predictions = policy.scored_hidden_states(moved), policy.lm_head_weight, moved.scored_targets
    columns = compared(token_logps(*predictions), ref_logps)
    columns["adds"] = beta * columns["log-ratio"]
    return Scored(batch, columns, distribution(*predictions))


def _mismatched(policy: Policy, method: KTO, rows: Sequence[SFTExample]) -> dict[int, Text]:
    """The completions that z0 is estimated from, by the place of the example whose prompt each has."""
    plain, found = SFT(method.batch_size, method.row_length, packing=False), dict[int, Text]()
    for batch in plain.micro_batches(method.mismatched(rows)):
        scored = _scored(policy, batch, method.config.beta)
        ratios = batch.sequence_sums(scored.columns["log-ratio"])
        for place, number in enumerate(batch.data_rows):
            numbers = {"log-ratio": float(ratios[place])}
            found[number] = scored.text(place, "mismatched", numbers, note="the completion of another prompt, for z₀")
    return found


def _of_batch(
    policy: Policy, method: KTO, batch: PackedBatch, examples: Sequence[SFTExample], mismatched: int
) -> list[Example]:
    scored, config = _scored(policy, batch, method.config.beta), method.config
    rows = labelled_logps(batch, scored.columns["policy"], scored.columns["reference"])
    with torch.enable_grad():
        leaf = rows.logps.detach().clone().requires_grad_()
        losses, _ = method.spec(replace(rows, logps=leaf), method.settings)
        (slopes,) = torch.autograd.grad(losses.sum(), leaf)
    z0 = rows.kl.clamp(min=0)
    each = {
        "policy": rows.logps,
        "reference": rows.ref_logps,
        "log-ratio": rows.logratios,
        "reward": config.beta * rows.logratios,
        "x": config.beta * (rows.logratios - z0),
        "weight": -slopes / config.beta,
        "loss": losses.detach(),
    }
    found = []
    for i, x in enumerate(examples):
        desirable = bool(rows.desirable[i])
        text = scored.text(i, "desirable" if desirable else "undesirable", named(each, i))
        prompt = torch.as_tensor(x.input_ids[: text.start], dtype=torch.int64)
        numbers, lines = {"KL estimate": float(rows.kl), "z₀": float(z0)}, equation(method, mismatched, text.name)
        found.append(Example(x.row, x.where, prompt, with_sums([text], "adds"), numbers, lines))
    return found


def equation(method: KTO, mismatched: int, label: str) -> dict[str, str]:
    """From the log-probabilities to the loss."""
    config = method.config
    weight, sign = (config.desirable_weight, "−") if label == "desirable" else (config.undesirable_weight, "")
    return {
        "policy": "log π(y|x), sum over tokens",
        "reference": "log ref(y|x)",
        "log-ratio": "r = log π − log ref",
        "reward": f"β r, β = {config.beta:g}",
        "KL estimate": f"mean log-ratio of {mismatched} mismatched completions",
        "z₀": "max(0, KL estimate)",
        "x": "β (r − z₀)",
        "weight": "−dL/d(reward)",
        "loss": f"{weight:g} · σ({sign}x), {label}",
    }


def view(method: KTO) -> View:
    """Of labelled completions."""
    return View(
        unit="labelled completion",
        tokens="",
        formula=formula(method.spec),
        words={
            **COMPARED,
            "adds": "what it adds to the reward: β · log-ratio",
            "sum": "of all that was added so far; the last one is the reward",
        }
        | WORDS,
        adds="adds",
        sums="reward",
        facts=("reward", "weight", "loss"),
        more=("tokens", "z₀"),
        measure="reward",
        caption="Rewards of {} completions, one square each. Blue: likelier than under the reference; orange: less "
        "likely.",
        colours=("adds",),
        by_text=True,
        symbols="σ: sigmoid; wD, wU: the weights of desirable and undesirable completions",
    )
